"""What kvmesh changes inside SGLang, in every process of it.

SGLang calls `register` by entry point before an engine starts. Everything here stays out of the way
of an SGLang that kvmesh did not start, because such a one may live in the same environment.
"""

from __future__ import annotations

import os

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvmesh.engine.sglang import (
    adapters,
    faults,
    grammars,
    idle,
    offloads,
    onboarding,
    outputs,
    page_hashes,
    penalties,
    pooling,
    rehearsals,
    reports,
    seeds,
    transfers,
)
from kvmesh.engine.sglang.environment import PLUGINS

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_DECODE = "sglang.srt.disaggregation.decode.SchedulerDisaggregationDecodeMixin"
_NIXL = "sglang.srt.disaggregation.nixl.conn"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer"
_CHANNELS = "sglang.srt.managers.scheduler_components.ipc_channels.SchedulerIpcChannels"
_LOAD = "sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer"
_BATCH = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_SAMPLER = "sglang.srt.layers.sampler.Sampler"
_MINIMUM = "sglang.srt.sampling.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer"
_POOLER = "sglang.srt.layers.pooler.Pooler"
_GRAMMARS = "sglang.srt.constrained.grammar_manager.GrammarManager"
_REQUEST = "sglang.srt.managers.schedule_batch.Req"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"
_STATS = "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats"

HOOKS = (
    (f"{_NIXL}.NixlKVManager.__init__", transfers.prepare_nixl, HookType.BEFORE),
    (f"{_NIXL}.NixlKVManager.conclude_transfer", transfers.note_conclusion, HookType.BEFORE),
    (f"{_NIXL}.NixlKVSender.get_transfer_metric", transfers.complete_metric, HookType.AFTER),
    (f"{_STATS}.compute_and_observe_kv_transfer_metrics", transfers.keep_metric, HookType.BEFORE),
    (f"{_SCHEDULER}.__init__", faults.record_fault, HookType.AROUND),
    (f"{_SCHEDULER}.run_event_loop", faults.record_fault, HookType.AROUND),
    (f"{_SCHEDULER}.on_idle", idle.wait_for_progress, HookType.AFTER),
    (f"{_NIXL}.NixlKVManager.update_status", idle.tell_news, HookType.AFTER),
    (f"{_GRAMMARS}.__init__", grammars.add_backend, HookType.AFTER),
    (f"{_REQUEST}.__init__", rehearsals.cache_rehearsal, HookType.AFTER),
    (f"{_REQUEST}.__init__", adapters.name_by_salt, HookType.AFTER),
    (f"{_DECODE}.process_decode_queue", offloads.take_completed, HookType.BEFORE),
    (f"{_SCHEDULER}._prefetch_kvcache", onboarding.look_ahead, HookType.AFTER),
    (f"{_SCHEDULER}.process_batch_result", onboarding.note_pace, HookType.AFTER),
    (f"{_ADDER}.add_one_req", onboarding.pass_over, HookType.AROUND),
    (f"{_LINKER}.load_back", onboarding.note_origins, HookType.AFTER),
    (f"{_STREAMER}.SchedulerOutputStreamer.get_cached_tokens_details", onboarding.name_tiers, HookType.AFTER),
    (f"{_SCHEDULER}.get_init_info", reports.describe_engine, HookType.AFTER),
    (f"{_LOAD}.get_loads", reports.extend_load, HookType.AFTER),
    (f"{_BATCH}.from_schedule_batch", seeds.add_seeds, HookType.AFTER),
    (f"{_BATCH}.merge_batch", seeds.match_seeds, HookType.BEFORE),
    (f"{_SAMPLER}._sample_from_probs", seeds.sample_seeded, HookType.AROUND),
    (f"{_MINIMUM}._prepare", penalties.prepare_minimum, HookType.AROUND),
    (f"{_POOLER}.__init__", pooling.pool_as_trained, HookType.AROUND),
    (page_hashes.TARGET, page_hashes.hash_pages, HookType.AROUND),
    (f"{_CHANNELS}.create", outputs.divert_outputs, HookType.AFTER),
    (f"{_STREAMER}.wrap_as_pickle", reports.pack_time_stats, HookType.AROUND),
)


def register() -> None:
    if os.environ.get(PLUGINS) != "1":
        return
    for target, hook, kind in HOOKS:
        HookRegistry.register(target, hook, kind)


def check_hooks() -> None:
    """Raise where a hook was not applied: SGLang only logs that."""
    missing = {target for target, _, _ in HOOKS} - HookRegistry._patched
    if missing:
        raise RuntimeError(
            f"kvmesh's hooks do not fit this sglang ({', '.join(sorted(missing))}); "
            "install the release kvmesh-engine pins"
        )
