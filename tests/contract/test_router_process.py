"""The router as a process: real NATS, real registrations, real events, over gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import yaml

from fixtures.holders import PAGE_SIZE, Holder, worker_info
from fixtures.nats import NatsServer
from fixtures.router import RouterMesh
from fixtures.waiting import eventually
from fixtures.workers import running
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.common_pb2 import Role, Tier, WorkerState
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import (
    ConfigureRequest,
    ExplainRequest,
    GetRatesRequest,
    GetStateResponse,
    LeaseReport,
    ReportRequest,
    RouteRequest,
    SelectRequest,
)


@pytest.fixture
async def mesh(tmp_path: Path, nats: NatsServer) -> AsyncIterator[RouterMesh]:
    mesh = RouterMesh(tmp_path, nats)
    await mesh.bus.start()
    mesh.start_router()
    yield mesh
    await mesh.close()


def ids(state: GetStateResponse) -> set[str]:
    return {worker.info.id for worker in state.workers}


async def refused(mesh: RouterMesh, request: RouteRequest) -> KvmeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.router.Route(request)
    return KvmeshError.from_rpc(caught.value, "router")


async def test_a_split_request_from_route_to_end(mesh: RouterMesh) -> None:
    await mesh.state()
    error = await refused(mesh, RouteRequest(model="tiny"))
    assert error.code == ErrorCode.ERROR_CODE_NO_WORKER_READY
    assert error.retry_after_ms > 0

    holder = await mesh.register(worker_info("prefill-0", Role.ROLE_PREFILL), events=True)
    assert holder is not None
    await mesh.register(worker_info("decode-0", Role.ROLE_DECODE))
    await mesh.until(lambda s: ids(s) == {"prefill-0", "decode-0"})
    assert (await refused(mesh, RouteRequest(model="other"))).code == ErrorCode.ERROR_CODE_MODEL_NOT_FOUND

    holder.store([1, 2, 3])
    await mesh.until(lambda s: any(w.indexed_blocks == 3 for w in s.workers))
    request = RouteRequest(
        request_id="r", model="default", block_hashes=[1, 2, 9], prompt_tokens=3 * PAGE_SIZE + 5, explain=True
    )
    response = await mesh.router.Route(request)
    assert response.placement.prefill.id == "prefill-0"
    assert response.placement.decode.id == "decode-0"
    assert (response.placement.bootstrap.host, response.placement.bootstrap.port) == ("10.0.0.1", 7000)
    assert 0 < response.placement.bootstrap.room < 2**63
    assert response.expected.cached.device == 2 * PAGE_SIZE
    (candidate,) = response.candidates
    assert candidate.cost == pytest.approx(sum(candidate.terms.values()))
    assert response.policy == "kv"
    # What the first computes is counted as cached for the second. The policy is one that holds nothing back:
    # the first is never reported, and by `kv` the second would wait for it until its lease expires.
    request.policy = "least-loaded"
    again = await mesh.router.Route(request)
    assert again.placement.bootstrap.room != response.placement.bootstrap.room
    assert again.expected.cached.device == 3 * PAGE_SIZE

    state = await mesh.state()
    workers = {worker.info.id: worker for worker in state.workers}
    assert state.leases == 2
    assert workers["prefill-0"].queued_prefill_tokens == (PAGE_SIZE + 5) + 5
    assert workers["decode-0"].active_blocks == 8
    reports = [
        LeaseReport(lease_id=response.lease.id, prefill_done=True, output_tokens=1),
        LeaseReport(lease_id=12345, ended=True),
    ]
    answer = await mesh.router.Report(ReportRequest(reports=reports))
    assert list(answer.unknown_lease_ids) == [12345]
    await mesh.router.Report(ReportRequest(reports=[LeaseReport(lease_id=response.lease.id, ended=True)]))
    # The other is never heard of again.
    state = await mesh.until(lambda s: s.leases == 0)
    assert state.leases_expired_total == 1
    assert all(not (w.leases or w.queued_prefill_tokens or w.active_blocks) for w in state.workers)


async def test_a_selection_takes_nothing_out(mesh: RouterMesh) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.router.Select(SelectRequest(), wait_for_ready=True, timeout=60)
    assert KvmeshError.from_rpc(caught.value, "router").code == ErrorCode.ERROR_CODE_NO_WORKER_READY
    await mesh.register(worker_info("prefill-0", Role.ROLE_PREFILL))
    await mesh.register(worker_info("decode-0", Role.ROLE_DECODE))
    await mesh.until(lambda s: ids(s) == {"prefill-0", "decode-0"})
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.router.Select(SelectRequest(route=RouteRequest(policy="best")))
    assert KvmeshError.from_rpc(caught.value, "router").code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    route = RouteRequest(request_id="r", block_hashes=[1, 2], prompt_tokens=40, explain=True)
    selected = [await mesh.router.Select(SelectRequest(route=route)) for _ in range(3)]
    state = await mesh.state()
    assert not state.leases
    assert not any(worker.queued_prefill_tokens or worker.active_blocks for worker in state.workers)
    with pytest.raises(grpc.RpcError):
        await mesh.router.Explain(ExplainRequest(request_id="r"))
    placed = await mesh.router.Route(route)
    assert len({one.placement.bootstrap.room for one in [*selected, placed]}) == 4
    for one in selected:
        assert one.placement.prefill == placed.placement.prefill
        assert one.placement.decode == placed.placement.decode
        assert one.expected == placed.expected
        assert list(one.candidates) == list(placed.candidates)
        assert one.policy == "kv"
        assert one.predicted_ttft_ms > 0
    # The worker is busy now: a route would wait, a selection does not.
    again = await mesh.router.Select(SelectRequest(route=route))
    assert again.expected.cached.device == 2 * PAGE_SIZE
    assert again.candidates[0].terms["queue"] > 0


async def test_a_router_explains_itself_and_is_changed(mesh: RouterMesh) -> None:
    await mesh.register(worker_info("a"))
    await mesh.register(worker_info("b"))
    await mesh.until(lambda s: ids(s) == {"a", "b"})
    response = await mesh.route_and_end(RouteRequest(request_id="why", prompt_tokens=100))
    (decision,) = (await mesh.router.Explain(ExplainRequest(request_id="why"))).decisions
    assert decision.winner.decode_id == response.placement.decode.id
    assert {candidate.decode_id for candidate in decision.candidates} == {"a", "b"}
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.router.Explain(ExplainRequest(request_id="never heard of"))
    assert KvmeshError.from_rpc(caught.value, "router").code == ErrorCode.ERROR_CODE_NOT_FOUND
    (rates,) = (await mesh.router.GetRates(GetRatesRequest())).models
    assert {law.name for of in rates.classes for law in of.laws} == {
        "prefill",
        "decode",
        "transfer",
        "onboard",
    }
    await mesh.router.Configure(ConfigureRequest(policy="random", temperature=0.5))
    assert (await mesh.route_and_end(RouteRequest(prompt_tokens=100))).policy == "random"
    state = await mesh.state()
    assert (state.policy, state.temperature) == ("random", 0.5)


async def test_rates_start_from_what_engines_measured(
    mesh: RouterMesh, nats: NatsServer, tmp_path: Path
) -> None:
    law = {
        "prefill_base_ms": 40.0,
        "prefill_token_ms": 0.5,
        "decode_base_ms": 30.0,
        "decode_sequence_ms": 2.0,
        "transfer_gib_s": 0.5,
    }
    async with (
        running("decode", tmp_path, nats.url, mesh.channels, mock=law),
        running("prefill", tmp_path, nats.url, mesh.channels, mock=law),
    ):
        await mesh.until(
            lambda s: sum(w.info.state == WorkerState.WORKER_STATE_READY for w in s.workers) == 2
        )
        ((of,),) = [each.classes for each in (await mesh.router.GetRates(GetRatesRequest())).models]
        laws = {law.name: law for law in of.laws}
        assert of.workers == 2
        assert not any(law.observations for law in laws.values())
        prefill, decode = laws["prefill"].coefficients, laws["decode"].coefficients
        assert (prefill["pass"], prefill["token"]) == (
            pytest.approx(40, rel=0.05),
            pytest.approx(0.5, rel=0.05),
        )
        assert (decode["step"], decode["stream"]) == (pytest.approx(30, rel=0.05), pytest.approx(2, rel=0.05))
        # 64 KiB a token.
        assert laws["transfer"].coefficients["token"] == pytest.approx(1000 / 16 / 512, rel=0.05)


async def test_a_log_is_replayed_by_the_command(mesh: RouterMesh, tmp_path: Path) -> None:
    mesh.stop_router()
    configured = yaml.safe_load(mesh.file.read_text())
    log = tmp_path / "decisions"
    configured["router"] |= {"decision_log": {"path": str(log)}, "shadow": ["least-loaded"]}
    mesh.file.write_text(yaml.safe_dump(configured))
    mesh.start_router()
    holder = await mesh.register(worker_info("a"), events=True)
    assert holder is not None
    await mesh.register(worker_info("b"))
    await mesh.until(lambda s: ids(s) == {"a", "b"})
    holder.store([1, 2, 3])
    await mesh.until(lambda s: s.index.blocks == 3)
    for number in range(20):
        await mesh.route_and_end(
            RouteRequest(request_id=f"r{number}", block_hashes=[1, 2, 3, number], prompt_tokens=70)
        )
    command = [sys.executable, "-m", "kvmesh.cli", "router"]
    router = ["--router", mesh.config.router.effective_addresses()[0]]

    async def run(*arguments: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run, [*command, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "least-loaded would have chosen" in await run("explain", "r3", *router)
    (now,) = json.loads(await run("set", "max_waiting", "7", "--json", *router))
    assert (now["max_waiting"], now["shadow"]) == (7, ["least-loaded"])
    (tmp_path / "rates.json").write_text(await run("rates", "--json", *router))
    mesh.stop_router(signal.SIGTERM)
    (report,) = json.loads(await run("replay", str(log), "--json", "--policy", "round-robin"))
    assert (report["decisions"], report["same"], report["missing"]) == (20, 20, 0)
    assert {other["policy"] for other in report["others"]} == {"round-robin", "least-loaded in the log"}
    assert report["changes"][-1][1]["max_held"] == 7
    shown = await run("replay", str(log), "--rates", str(tmp_path / "rates.json"))
    assert "20 of 20 decisions came out the same" in shown
    assert "kv by the rates given" in shown


async def test_a_route_that_its_caller_gives_up_is_taken_back(mesh: RouterMesh) -> None:
    await mesh.register(worker_info("a"))
    await mesh.until(lambda s: ids(s) == {"a"})
    first = await mesh.router.Route(RouteRequest(prompt_tokens=8000))
    # The worker is busy: it stays so, for as long as its lease is renewed and its prompt not reported.
    waiting = mesh.router.Route(RouteRequest(prompt_tokens=8000))
    await mesh.until(lambda s: s.held == 1)
    waiting.cancel()
    await mesh.until(lambda s: s.held == 0)
    await mesh.router.Report(ReportRequest(reports=[LeaseReport(lease_id=first.lease.id, ended=True)]))
    await mesh.until(lambda s: s.leases == 0)


async def test_workers_leave(mesh: RouterMesh) -> None:
    await mesh.register(worker_info("a"), events=True)
    await mesh.register(worker_info("b"), events=True)
    await mesh.until(lambda s: ids(s) == {"a", "b"})
    await mesh.registered["a"][1].deregister()
    await mesh.until(lambda s: ids(s) == {"b"})
    await mesh.vanish("b")
    await mesh.until(lambda s: not s.workers)
    assert (await refused(mesh, RouteRequest())).code == ErrorCode.ERROR_CODE_NO_WORKER_READY


async def test_routing_goes_on_without_nats(mesh: RouterMesh, nats: NatsServer) -> None:
    holder = await mesh.register(worker_info("a"), events=True)
    assert holder is not None
    await mesh.until(lambda s: ids(s) == {"a"})
    holder.store([1, 2])
    await mesh.until(lambda s: s.index.blocks == 2)
    nats.stop(empty=True)
    await mesh.until(lambda s: not s.bus_connected)
    holder.store([3])
    for _ in range(5):
        response = await mesh.route_and_end(RouteRequest(block_hashes=[1, 2, 3], prompt_tokens=49))
        assert response.expected.cached.device == 32
    nats.start()
    await mesh.until(lambda s: s.bus_connected and s.index.blocks == 3 and ids(s) == {"a"})
    response = await mesh.router.Route(RouteRequest(block_hashes=[1, 2, 3], prompt_tokens=49))
    assert response.expected.cached.device == 48


async def test_a_restarted_router_knows_again(mesh: RouterMesh) -> None:
    holder = await mesh.register(worker_info("a"), events=True)
    assert holder is not None
    await mesh.until(lambda s: ids(s) == {"a"})
    holder.store(range(1, 1001))
    await mesh.until(lambda s: s.index.blocks == 1000)
    mesh.stop_router(signal.SIGKILL)
    mesh.start_router()
    await mesh.until(lambda s: s.index.blocks == 1000 and s.index.workers == 1, timeout=30)


async def test_the_node_store_counts_for_its_engines(mesh: RouterMesh) -> None:
    store = Holder(mesh.config.kvbm.id, mesh.bus, tier=Tier.TIER_HOST, node=mesh.config.node)
    await store.serve(mesh.config.kvbm.port)
    mesh.holders.append(store)
    await mesh.register(worker_info("near", node=mesh.config.node), events=True)
    await mesh.register(worker_info("far", node="elsewhere"), events=True)
    await mesh.until(lambda s: ids(s) == {"near", "far"})
    await eventually(lambda: mesh.bus.connected)
    store.store([1, 2, 3])
    await mesh.until(lambda s: s.index.blocks == 3)
    request = RouteRequest(block_hashes=[1, 2, 3], prompt_tokens=49, explain=True)
    response = await mesh.router.Route(request)
    cached = {candidate.decode_id: candidate.cached.host for candidate in response.candidates}
    assert cached == {"near": 48, "far": 0}
    assert response.placement.decode.id == "near"
    await store.stop()
    await mesh.until(lambda s: s.index.blocks == 0)


async def test_an_orderly_stop_and_the_http_side(mesh: RouterMesh) -> None:
    await mesh.state()
    base = f"http://127.0.0.1:{mesh.config.router.metrics_port}"
    async with httpx.AsyncClient(base_url=base) as client:
        assert (await client.get("/ready")).status_code == 200
        metrics = (await client.get("/metrics")).text
    for name in ("leases", "index_blocks", "index_bytes", "bus_connected", "rpc_requests_total"):
        assert f"\nkvmesh_router_{name}" in metrics
    assert mesh.stop_router(signal.SIGTERM) == 0


async def test_what_the_index_forgets_at_its_cap_is_counted(tmp_path: Path, nats: NatsServer) -> None:
    mesh = RouterMesh(tmp_path, nats, index_max_bytes=200_000)
    try:
        await mesh.bus.start()
        mesh.start_router()
        await mesh.state()
        holder = await mesh.register(worker_info("w"), events=True)
        assert holder is not None
        holder.store(range(40_000))
        # All of it has come: what is held and what is not make up the whole.
        state = await mesh.until(lambda s: s.index.forgotten_total + s.index.blocks == 40_000)
        assert state.index.forgotten_total > 0
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{mesh.config.router.metrics_port}/metrics")).text
        (line,) = (line for line in text.splitlines() if line.startswith("kvmesh_router_index_forgotten_"))
        assert line == f"kvmesh_router_index_forgotten_blocks {float(state.index.forgotten_total)}"
    finally:
        await mesh.close()


def test_a_bad_policy_is_said_at_the_start() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kvmesh.router"],
        env={
            **os.environ,
            "KVMESH_ROUTER__POLICY": "kvv",
            "KVMESH_ROUTER__PORT": "0",
            "KVMESH_ROUTER__METRICS_PORT": "0",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "kvmesh router: unknown policy `kvv`; did you mean `kv`?"
