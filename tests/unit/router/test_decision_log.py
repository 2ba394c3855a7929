"""The decision log of a router, and policies that look on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from fixtures.holders import worker_info
from fixtures.routing import Router, request
from kvmesh.common.config import DecisionLogConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.core import replay
from kvmesh.v1.common_pb2 import Role
from kvmesh.v1.router_pb2 import ConfigureRequest, PolicyNames


def logging(path: Path, **config: Any) -> Router:
    return Router(decision_log=DecisionLogConfig(path=str(path), max_bytes=1 << 20), **config)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvmesh_router_{name}", labels) or 0.0


def regrets() -> list[float]:
    """Of `kv` as a shadow: placements by regret, up to a millisecond less than none, up to one, and all."""
    bounds = ("-0.001", "0.001", "+Inf")
    return [value("shadow_regret_seconds_bucket", policy="kv", le=le) for le in bounds]


async def drive(router: Router, count: int = 60) -> None:
    """Requests with prefixes in common, events that confirm some, reports on all."""
    for number in range(count):
        family = 1000 * (number % 5)
        blocks = [family + at for at in range(1, 2 + number % 7)]
        policy = "session" if number % 11 == 3 else ""
        response = await router.route(
            request(blocks, 16 * len(blocks) + 5, request_id=f"r{number}", policy=policy, tenant="t")
        )
        router.now += 0.05
        router.report(response.lease.id, prefill_done=True, output_tokens=1)
        router.now += 0.1
        router.report(response.lease.id, output_tokens=20 + number, ended=True)
        await router.turns()


async def test_what_was_logged_is_decided_again(tmp_path: Path) -> None:
    router = logging(tmp_path)
    router.put(worker_info("a"), worker_info("p", Role.ROLE_PREFILL), worker_info("d", Role.ROLE_DECODE))
    router.index("a")
    router.hold("a", [1, 2, 3])
    await drive(router)
    router.routing.configure(
        ConfigureRequest(policy="least-loaded", shadow=PolicyNames(names=["kv"])), "an operator"
    )
    router.members.drop("a")
    router.put(worker_info("b"))
    await drive(router)
    router.routing.close()
    (report,) = json.loads(replay(tmp_path))
    assert report["model"] == "tiny"
    assert (report["decisions"], report["same"], report["differences"]) == (120, 120, [])
    _, (_, change) = report["changes"]
    assert change["by"] == "an operator"
    assert (change["policy"], change["shadows"]) == ("least-loaded", ["kv"])
    (kv,) = report["others"]
    assert (kv["policy"], kv["decisions"]) == ("kv in the log", 60)
    (asked,) = [
        o for o in json.loads(replay(tmp_path, policy="random"))[0]["others"] if o["policy"] == "random"
    ]
    assert asked["decisions"] == 120
    assert asked["differ"] > 0


@pytest.mark.parametrize("policy", ["kv", "round-robin", "random"])
async def test_selections_change_no_decision_and_are_not_logged(tmp_path: Path, policy: str) -> None:
    async def placements(path: Path, selections: int) -> list[str]:
        router = logging(path, policy=policy)
        router.put(worker_info("a"), worker_info("b"), worker_info("c"))
        placed = []
        for number in range(30):
            asked = request([number % 3, number], 40, request_id=f"r{number}")
            selected = [router.routing.select(asked) for _ in range(selections)]
            response = await router.route(asked)
            placed.append(response.placement.decode.id)
            if policy == "round-robin":
                assert {one.placement.decode.id for one in selected} <= {placed[-1]}
            router.now += 0.05
            router.report(response.lease.id, prefill_done=True, output_tokens=1, ended=number % 2 == 0)
        router.routing.close()
        (report,) = json.loads(replay(path))
        assert (report["decisions"], report["same"]) == (30, 30)
        return placed

    assert await placements(tmp_path / "asked", 3) == await placements(tmp_path / "plain", 0)


async def test_no_prompt_and_no_other_secret_is_in_it(tmp_path: Path) -> None:
    router = logging(tmp_path)
    router.put(worker_info("a"))
    await router.route(
        request([1, 2], 40, request_id="seen", tenant="a tenant's key", session_id="a session")
    )
    router.routing.close()
    text = (tmp_path / "tiny.00000001.jsonl").read_text()
    assert "seen" in text
    assert "a tenant" not in text
    assert "a session" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [next(iter(line)) for line in lines[:2]] == ["head", "snapshot"]


async def test_a_router_without_a_log_writes_none(tmp_path: Path) -> None:
    router = Router()
    router.put(worker_info("a"))
    await router.route(request())
    assert router.routing.models["tiny"].selector.log_stats() is None


async def test_a_log_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KvmeshError, match=r"router\.decision_log\.path"):
        logging(tmp_path / "file" / "below")


async def test_two_routers_do_not_share_a_log(tmp_path: Path) -> None:
    first, second = logging(tmp_path), logging(tmp_path)
    for router in (first, second):
        router.put(worker_info("a"))
        await router.route(request(request_id="r"))
    # The second serves all the same.
    assert second.service.state().leases == 1
    assert second.routing.models["tiny"].selector.log_stats() is None
    first.routing.close()
    (report,) = json.loads(replay(tmp_path))
    assert (report["decisions"], report["same"]) == (1, 1)


async def test_shadows_are_counted_and_explained() -> None:
    router = Router(policy="round-robin", shadow=["kv", "round-robin"])
    router.put(worker_info("a"), worker_info("b"))
    router.index("a")
    router.hold("a", list(range(1, 40)))
    before = {key: value("shadow_placements_total", policy="kv", choice=key) for key in ("same", "other")}
    spent = {key: value("shadow_cost_seconds_total", policy="kv", of=key) for key in ("live", "shadow")}
    regretted = regrets()
    for number in range(8):
        response = await router.route(request(list(range(1, 40)), 16 * 39 + 9, request_id=f"s{number}"))
        router.report(response.lease.id, prefill_done=True, ended=True)
    same, other = (
        value("shadow_placements_total", policy="kv", choice=key) - before[key] for key in ("same", "other")
    )
    assert (same + other, same >= 4) == (8, True)
    live, shadow = (value("shadow_cost_seconds_total", policy="kv", of=key) - spent[key] for key in spent)
    assert shadow <= live
    worse, little, all_of_them = (now - was for now, was in zip(regrets(), regretted, strict=True))
    assert worse == 0, "kv does not choose what costs more"
    assert (all_of_them, all_of_them > little) == (8, True)
    (decision,) = router.routing.decisions.of("s0")
    kv, turns = decision.to_proto().shadows
    assert (kv.policy, kv.decode_id) == ("kv", "a")
    assert turns.decode_id == decision.to_proto().winner.decode_id
    assert turns.live_cost == pytest.approx(turns.cost)
    # Switched off at run time.
    router.routing.configure(ConfigureRequest(shadow=PolicyNames()), "test")
    await router.route(request(request_id="after"))
    assert not router.routing.decisions.of("after")[0].to_proto().shadows


async def test_an_unknown_shadow_is_refused_at_the_start() -> None:
    with pytest.raises(KvmeshError, match="did you mean `kv`"):
        Router(shadow=["kvv"])
