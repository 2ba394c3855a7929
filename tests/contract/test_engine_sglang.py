"""What is SGLang's own: aborts of halves, seeds, deaths of processes. `test_engine.py` holds the rest."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from fixtures.mesh import SHALLOW
from fixtures.waiting import eventually
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import (
    Bootstrap,
    Constraint,
    ConstraintKind,
    EngineInfo,
    EngineRequest,
    FinishReason,
    Role,
    Sampling,
    StepOutput,
)
from kvmesh.engine.model import resolve_model
from kvmesh.engine.sglang.engine import SglangEngine
from kvmesh.v1.errors_pb2 import ErrorCode

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
]

CONFIG: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "kvbm": {"enabled": False},
    "engine": {"args": {"max_total_tokens": 8192, **SHALLOW}},
}


def make(role: Role, model_path: str = "", **config: Any) -> SglangEngine:
    loaded = load_config(overrides=CONFIG | config)
    return SglangEngine(
        loaded, role, model_path=model_path or resolve_model(loaded).path, worker_id=f"{role}-0"
    )


class Pair:
    """A prefill and a decode engine."""

    def __init__(self) -> None:
        self.prefill, self.decode = make(Role.PREFILL), make(Role.DECODE)
        self.info: EngineInfo

    async def start(self) -> None:
        self.info, _ = await asyncio.gather(self.prefill.start(), self.decode.start())

    async def close(self) -> None:
        await asyncio.gather(self.prefill.close(), self.decode.close())

    def room(self) -> Bootstrap:
        return Bootstrap(self.info.bootstrap_host, self.info.bootstrap_port, random.getrandbits(63))

    def idle(self) -> bool:
        loads = (self.prefill.load(), self.decode.load())
        return not any(
            load.requests or load.queued_requests or load.blocks_used or load.transfers for load in loads
        )

    async def generate(self, prompt: list[int], sampling: Sampling) -> list[int]:
        request = EngineRequest("test", prompt, sampling, self.room())
        first, outputs = await asyncio.gather(collect(self.prefill, request), collect(self.decode, request))
        assert first[-1].finish is not None
        assert first[-1].finish.reason is FinishReason.LENGTH
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.error is None
        return [token for output in outputs for token in output.token_ids]


async def collect(engine: SglangEngine, request: EngineRequest) -> list[StepOutput]:
    return [output async for output in engine.generate(request)]


def reason(outputs: list[StepOutput]) -> FinishReason | None:
    finish = outputs[-1].finish if outputs else None
    return finish.reason if finish else None


def prompt(length: int) -> list[int]:
    return [random.randrange(1_000, 40_000) for _ in range(length)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{resolve_model(load_config(overrides=CONFIG)).path}/tokenizer.json")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    try:
        await pair.start()
        yield pair
    finally:
        await pair.close()


STAGES = {
    # (halves submitted, prompt tokens, seconds or decoded tokens to wait for)
    "decode waits for prefill": (("decode",), 40, 0.3),
    "prefill waits for decode": (("prefill",), 40, 0.3),
    "just submitted": (("prefill", "decode"), 40, 0.0),
    "prefill computes": (("prefill", "decode"), 6_000, 0.2),
    "decode decodes": (("prefill", "decode"), 40, 3),
}


@pytest.mark.parametrize("stage", STAGES)
async def test_an_abort_frees_both_halves_in_every_stage(pair: Pair, stage: str) -> None:
    names, length, wait = STAGES[stage]
    await pair.generate(prompt(20), Sampling(temperature=0, max_new_tokens=2))
    request = EngineRequest("test", prompt(length), Sampling(temperature=0, ignore_eos=True), pair.room())
    outputs: dict[str, list[StepOutput]] = {name: [] for name in names}
    handles = {name: getattr(pair, name).submit(request, outputs[name].extend) for name in names}
    if isinstance(wait, int):
        await eventually(lambda: len(outputs["decode"]) >= wait, 60)
    else:
        await asyncio.sleep(wait)
    for name, handle in handles.items():
        getattr(pair, name).abort(handle)
    # A chunk of prefill that has begun runs to its end; then both must let go within two seconds.
    slack = 10.0 if stage == "prefill computes" else 0.0
    await eventually(lambda: all(reason(got) for got in outputs.values()), 2.0 + slack)
    await eventually(pair.idle, 2.0, "both halves to hold nothing")
    assert reason(outputs[names[-1]]) is FinishReason.CANCELLED
    assert sum(output.finish is not None for got in outputs.values() for output in got) == len(names)


async def test_seeds_decide_the_text_and_company_does_not(pair: Pair) -> None:
    text, seeds = prompt(30), range(11, 19)

    def seeded(seed: int | None) -> Sampling:
        return Sampling(temperature=1.2, top_p=0.95, max_new_tokens=4, ignore_eos=True, seed=seed)

    alone = [await pair.generate(text, seeded(seed)) for seed in seeds]
    together = await asyncio.gather(*(pair.generate(text, seeded(seed)) for seed in (*seeds, None, None)))
    # Two seeds may well lead to the same few tokens.
    assert len({tuple(tokens) for tokens in together}) > len(seeds) // 2
    # Not all: the shape of a batch changes the last bits of a probability, and now and then a choice.
    assert sum(one == other for one, other in zip(alone, together, strict=False)) > len(seeds) // 2


async def test_penalties_and_a_least_length(pair: Pair) -> None:
    text = prompt(20)
    greedy = Sampling(temperature=0, max_new_tokens=12, ignore_eos=True)
    plain = await pair.generate(text, greedy)
    penalised = Sampling(
        temperature=0,
        max_new_tokens=12,
        ignore_eos=True,
        frequency_penalty=2.0,
        presence_penalty=2.0,
        repetition_penalty=1.8,
    )
    assert len(await pair.generate(text, penalised)) == 12
    held = Sampling(temperature=0, max_new_tokens=12, min_new_tokens=8, stop_token_ids=(plain[3],))
    assert len(await pair.generate(text, held)) >= 8


CITY = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Paris", "Rome"]},
        "districts": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 20},
            "maxItems": 3,
        },
    },
    "required": ["name", "districts"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "schema": (ConstraintKind.JSON_SCHEMA, json.dumps(CITY)),
    "regex": (ConstraintKind.REGEX, r"[a-c]{3}-\d"),
    "ebnf": (ConstraintKind.EBNF, 'root ::= ("yes" | "no") "\\u00e9"'),
    "tag": (
        ConstraintKind.STRUCTURAL_TAG,
        '{"type": "structural_tag", "format": {"type": "const_string", "value": "so be it"}}',
    ),
}


def keeps(name: str, text: str) -> bool:
    match name:
        case "schema":
            city = json.loads(text)
            districts = city.pop("districts")
            numbers = all(isinstance(one, int) and 1 <= one <= 20 for one in districts)
            return city in ({"name": "Paris"}, {"name": "Rome"}) and numbers and len(districts) <= 3
        case "regex":
            return re.fullmatch(r"[a-c]{3}-\d", text) is not None
        case "ebnf":
            return text in ("yesé", "noé")
        case _:
            return text == "so be it"


@pytest.mark.parametrize("name", CONSTRAINTS)
async def test_constraints_are_kept_through_both_halves(pair: Pair, tokenizer: Tokenizer, name: str) -> None:
    constraint = Constraint(*CONSTRAINTS[name])
    greedy = Sampling(temperature=0, max_new_tokens=100, constraint=constraint)
    seeded = [Sampling(temperature=1, max_new_tokens=100, constraint=constraint, seed=i) for i in range(3)]
    free = Sampling(temperature=0, max_new_tokens=6, ignore_eos=True)
    texts = await asyncio.gather(*(pair.generate(prompt(20), s) for s in (greedy, *seeded, free)))
    for tokens in texts[:-1]:
        assert keeps(name, tokenizer.decode(tokens)), tokenizer.decode(tokens)
    # Its neighbours' constraints are not its own.
    assert len(texts[-1]) == 6


@pytest.mark.parametrize(
    "bad",
    [
        (ConstraintKind.JSON_SCHEMA, '{"type": "city"}'),
        (ConstraintKind.JSON_SCHEMA, '{"$ref": "#/$defs/none"}'),
        (ConstraintKind.JSON_SCHEMA, '{"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}'),
        (ConstraintKind.JSON_SCHEMA, "false"),
        (ConstraintKind.REGEX, "("),
        (ConstraintKind.REGEX, "a\0"),
        (ConstraintKind.EBNF, 'root ::= "a" nobody'),
        (ConstraintKind.EBNF, "root ::= root"),
        (ConstraintKind.STRUCTURAL_TAG, "[]"),
    ],
)
async def test_bad_constraints_end_with_the_clients_fault(
    pair: Pair, bad: tuple[ConstraintKind, str]
) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=8, constraint=Constraint(*bad))
    request = EngineRequest("test", prompt(20), sampling, pair.room())
    both = [asyncio.create_task(collect(engine, request)) for engine in (pair.prefill, pair.decode)]
    outputs = await both[0]
    finish = outputs[-1].finish
    assert finish is not None
    assert finish.error is not None
    assert (finish.error.code, finish.error.param) == (ErrorCode.ERROR_CODE_INVALID_ARGUMENT, "constraint")
    assert len(finish.error.message) < 400
    assert not any(output.token_ids for output in outputs)
    for task in both:
        task.cancel()
    await asyncio.gather(*both, return_exceptions=True)
    await eventually(pair.idle, 10, "both halves to hold nothing")


async def test_idle_engines_hardly_take_cpu(pair: Pair) -> None:
    """In the best of some stretches: a neighbour's load makes the same little work take longer."""
    await eventually(pair.idle, 5)
    processes = [psutil.Process(pid) for pid in pids(pair.prefill) + pids(pair.decode)]

    async def share(seconds: float) -> float:
        await asyncio.sleep(1.5)
        before = sum(cpu_seconds(process) for process in processes)
        await asyncio.sleep(seconds)
        return (sum(cpu_seconds(process) for process in processes) - before) / seconds

    shares = [await share(4)]
    while shares[-1] >= 0.12 and len(shares) < 6:
        shares.append(await share(4))
    assert min(shares) < 0.12, f"shares of a core: {shares}"


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def pids(engine: SglangEngine) -> list[int]:
    assert engine._process is not None
    assert engine._process._launcher is not None
    return [engine._process._launcher.pid, *engine._process.scheduler_pids]


async def test_a_killed_scheduler_is_noticed_at_once(pair: Pair) -> None:
    request = EngineRequest("test", prompt(30), Sampling(temperature=0, ignore_eos=True), pair.room())
    outputs: list[StepOutput] = []
    pair.decode.submit(request, outputs.extend)
    half = pair.prefill.submit(request, lambda _outputs: None)
    await eventually(lambda: outputs, 60)
    os.kill(pids(pair.decode)[1], signal.SIGKILL)
    error = await asyncio.wait_for(pair.decode.failed(), 2)
    assert error.code == ErrorCode.ERROR_CODE_ENGINE_FAILED
    assert "SIGKILL" in error.message
    await eventually(lambda: reason(outputs) is FinishReason.ERROR, 1)
    with pytest.raises(KvmeshError):
        pair.decode.submit(request, outputs.extend)
    pair.prefill.abort(half)
    # The other engine lives on.
    await eventually(lambda: not pair.prefill.load().blocks_used, 5)
    directory = pair.decode._directory
    left = pids(pair.decode)
    await pair.decode.close()
    assert not existing(directory)
    assert not any(psutil.pid_exists(pid) for pid in left)


async def test_a_killed_launcher_takes_its_scheduler_along(pair: Pair) -> None:
    launcher, scheduler = pids(pair.prefill)
    os.kill(launcher, signal.SIGKILL)
    error = await asyncio.wait_for(pair.prefill.failed(), 2)
    assert error.code == ErrorCode.ERROR_CODE_ENGINE_FAILED
    await eventually(lambda: not alive(scheduler), 2)


def existing(*paths: str) -> list[str]:
    return [path for path in paths if os.path.exists(path)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_nothing_outlives_a_killed_worker() -> None:
    """The worker dies by SIGKILL while its engine starts, the moment the scheduler exists."""
    worker = textwrap.dedent(
        """
        import asyncio, json, sys
        from kvmesh.common.config import load_config
        from kvmesh.engine.contract import Role
        from kvmesh.engine.model import resolve_model
        from kvmesh.engine.sglang.engine import SglangEngine

        async def main():
            config = load_config(overrides=json.loads(sys.argv[1]))
            model = resolve_model(config).path
            engine = SglangEngine(config, Role.AGGREGATED, model_path=model, worker_id="killed")
            starting = asyncio.create_task(engine.start())
            while not (engine._process and engine._process.scheduler_pids):
                await asyncio.sleep(0.05)
                assert not starting.done()
            process = engine._process
            print(process._launcher.pid, *process.scheduler_pids, engine._directory, engine._load_file)
            sys.stdout.flush()
            await starting

        asyncio.run(main())
        """
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", worker, json.dumps(CONFIG), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    launcher, scheduler, directory, load_file = (await process.stdout.readline()).decode().split()
    process.kill()
    await process.wait()
    await eventually(lambda: not alive(int(launcher)) and not alive(int(scheduler)), 10)
    assert not existing(directory, load_file)


async def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            "no weights": (
                make(Role.AGGREGATED, str(tmp_path)),
                ErrorCode.ERROR_CODE_ENGINE_FAILED,
                "weights",
            ),
            "unknown argument": (
                make(Role.AGGREGATED, engine={"args": {"chunked_prefil_size": 1}}),
                ErrorCode.ERROR_CODE_INVALID_ARGUMENT,
                "did you mean `chunked_prefill_size`",
            ),
            "port taken": (
                make(Role.PREFILL, worker={"bootstrap_port": port}),
                ErrorCode.ERROR_CODE_UNAVAILABLE,
                f"bootstrap port {port}",
            ),
        }
        errors = await asyncio.gather(
            *(engine.start() for engine, _, _ in cases.values()), return_exceptions=True
        )
    for (name, (_, code, words)), error in zip(cases.items(), errors, strict=True):
        assert isinstance(error, KvmeshError), name
        assert error.code == code, (name, error)
        assert words in error.message, (name, error)
