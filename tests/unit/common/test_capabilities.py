"""What workers can do against what requests need."""

from __future__ import annotations

import pytest

from fixtures.holders import worker_info
from kvmesh.common.block_names import block_salt
from kvmesh.common.capabilities import capability_name, missing, needed, offered, offered_together
from kvmesh.v1.common_pb2 import (
    CAPABILITY_CONSTRAIN,
    CAPABILITY_EMBED,
    CAPABILITY_GENERATE,
    CAPABILITY_LOGPROBS,
    Capability,
    ModelInfo,
    Role,
    WorkerInfo,
)
from kvmesh.v1.errors_pb2 import ErrorCode


def worker(
    worker_id: str, role: Role, *capabilities: Capability, adapters: tuple[str, ...] = ()
) -> WorkerInfo:
    info = worker_info(worker_id, role)
    info.model.capabilities.extend(capabilities)
    info.model.adapters.extend(adapters)
    return info


def test_a_worker_that_says_nothing_can_do_all_but_embed() -> None:
    assert offered(ModelInfo(adapters=["x"])) == {"generate", "constrain", "logprobs", "adapter:x"}
    assert offered(ModelInfo(capabilities=[CAPABILITY_EMBED])) == {"embed"}


def test_a_capability_of_a_later_version_has_a_name() -> None:
    assert capability_name(CAPABILITY_LOGPROBS) == "logprobs"
    assert capability_name(99) == "99"  # pyright: ignore[reportArgumentType]


def test_a_pair_can_do_what_both_halves_can() -> None:
    workers = [
        worker("p", Role.ROLE_PREFILL, CAPABILITY_GENERATE, CAPABILITY_CONSTRAIN),
        worker("q", Role.ROLE_PREFILL, CAPABILITY_GENERATE),
        worker("d", Role.ROLE_DECODE, CAPABILITY_GENERATE, CAPABILITY_CONSTRAIN, CAPABILITY_LOGPROBS),
        worker("a", Role.ROLE_AGGREGATED, CAPABILITY_GENERATE, adapters=("x",)),
    ]
    assert offered_together(workers) == {
        frozenset({"generate", "constrain"}),
        frozenset({"generate"}),
        frozenset({"generate", "adapter:x"}),
    }
    assert offered_together(workers[:2]) == frozenset()


@pytest.mark.parametrize(
    ("needs", "adapter", "said"),
    [
        ([CAPABILITY_LOGPROBS], "", "no worker of model `m` has the capability `logprobs`;"),
        ([CAPABILITY_GENERATE], "y", "no worker of model `m` has the adapter `y`;"),
        (
            [CAPABILITY_CONSTRAIN, CAPABILITY_GENERATE],
            "x",
            "has the adapter `x` and the capability `constrain` and the capability `generate` together;",
        ),
    ],
)
def test_what_nobody_has_is_named(needs: list[Capability], adapter: str, said: str) -> None:
    offers = [frozenset({"generate", "adapter:x"}), frozenset({"generate", "constrain"})]
    error = missing("m", needed(needs, adapter), offers)
    assert error is not None
    assert error.code == ErrorCode.ERROR_CODE_UNSUPPORTED
    assert said in error.message


def test_nothing_is_missing_where_somebody_has_it_or_nobody_is_known() -> None:
    assert missing("m", needed([CAPABILITY_GENERATE], "x"), [frozenset({"generate", "adapter:x"})]) is None
    assert missing("m", needed([CAPABILITY_EMBED]), []) is None


def test_blocks_of_an_adapter_are_named_apart() -> None:
    salts = [block_salt(salt, adapter) for salt in ("", "tenant:t") for adapter in ("", "x")]
    assert salts == ["", "adapter:x", "tenant:t", "tenant:t/adapter:x"]
