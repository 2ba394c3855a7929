"""The service's decisions, in process, with time and chance in the test's hands."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from fixtures.holders import PAGE_SIZE, worker_info
from fixtures.routing import Router, request
from fixtures.waiting import eventually
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.columns import Kind
from kvmesh.core import TERMS
from kvmesh.v1.common_pb2 import Role, WorkerState
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import ConfigureRequest, PolicyNames


@pytest.fixture
async def router() -> Router:
    return Router()


async def test_an_aggregated_placement(router: Router) -> None:
    router.put(worker_info("a", address="10.0.0.9:1234", incarnation=77))
    response = await router.route(request())
    assert not response.placement.HasField("prefill")
    assert not response.placement.HasField("bootstrap")
    decode = response.placement.decode
    assert (decode.id, decode.incarnation, decode.address) == ("a", 77, "10.0.0.9:1234")
    assert response.lease.id
    assert response.lease.ttl_ms == 10_000
    assert not response.candidates, "only on request"


async def test_rooms_are_fresh_and_63_bits(router: Router) -> None:
    router.put(worker_info("p", Role.ROLE_PREFILL), worker_info("d", Role.ROLE_DECODE))
    rooms = []
    for _ in range(500):
        response = await router.route(request(policy="random"))
        rooms.append(response.placement.bootstrap.room)
        router.report(response.lease.id, ended=True)
    assert len(set(rooms)) == 500
    assert all(room < 2**63 for room in rooms)
    assert max(rooms) > 2**62


async def test_explain_lists_every_candidate_with_terms_that_add_up(router: Router) -> None:
    router.put(
        worker_info("p0", Role.ROLE_PREFILL),
        worker_info("p1", Role.ROLE_PREFILL),
        worker_info("d0", Role.ROLE_DECODE),
        worker_info("d1", Role.ROLE_DECODE),
        worker_info("a0"),
    )
    response = await router.route(request(tokens=5000, explain=True))
    pairs = {(p, d) for p in ("p0", "p1") for d in ("d0", "d1")}
    assert len(response.candidates) == 5
    assert {(c.prefill_id, c.decode_id) for c in response.candidates} == pairs | {("", "a0")}
    for candidate in response.candidates:
        assert set(candidate.terms) == set(TERMS)
        assert candidate.cost == pytest.approx(sum(candidate.terms.values()))
    chosen = (response.placement.prefill.id, response.placement.decode.id)
    costs = {(c.prefill_id, c.decode_id): c.cost for c in response.candidates}
    # Near ties are chance's.
    assert costs[chosen] <= min(costs.values()) * 1.01


async def test_the_cheapest_of_many_candidates_are_kept(router: Router) -> None:
    router.put(*(worker_info(f"a{number}") for number in range(40)))
    response = await router.route(request(request_id="r", tokens=1000))
    assert not response.candidates, "not asked for"
    (decision,) = [d.to_proto() for d in router.routing.decisions.of("r")]
    assert len(decision.candidates) == 16
    costs = [c.cost for c in decision.candidates]
    assert costs == sorted(costs)
    assert decision.winner.decode_id in {c.decode_id for c in decision.candidates}
    response = await router.route(request(tokens=1000, explain=True))
    assert len(response.candidates) == 40


async def test_a_policys_own_costs_are_explained(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b"))
    await router.route(request(policy="round-robin"))
    response = await router.route(request(policy="round-robin", explain=True))
    costs = {c.decode_id: c.cost for c in response.candidates}
    assert sorted(costs.values()) == [0.0, 1.0]
    assert costs[response.placement.decode.id] == 0.0
    assert all(c.terms["prefill"] > 0 for c in response.candidates), "predicted all the same"


async def test_decisions_can_be_looked_at_later(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b"))
    response = await router.route(request(request_id="r1", tokens=1000))
    (decision,) = [d.to_proto() for d in router.routing.decisions.of("r1")]
    assert (decision.model, decision.policy, decision.prompt_tokens) == ("tiny", "kv", 1000)
    assert decision.winner.decode_id == response.placement.decode.id
    assert {c.decode_id for c in decision.candidates} == {"a", "b"}
    assert decision.predicted_ttft_ms > 0
    assert decision.actual_ttft_ms == 0
    await router.wait(0.25)
    router.report(response.lease.id, prefill_done=True, output_tokens=1)
    (decision,) = router.routing.decisions.of("r1")
    assert decision.actual_ttft_ms == pytest.approx(250, abs=1)
    assert router.routing.decisions.of("r2") == []


async def test_the_log_of_decisions_is_bounded() -> None:
    router = Router(policy="random", explained_requests=3)
    router.put(worker_info("a"))
    for number in range(10):
        for _ in range(20):
            response = await router.route(request(request_id=f"r{number}"))
            router.report(response.lease.id, ended=True)
    known = {f"r{n}": len(router.routing.decisions.of(f"r{n}")) for n in range(10)}
    assert known == {f"r{n}": 0 for n in range(7)} | {"r7": 8, "r8": 8, "r9": 8}


async def test_expectations_match_the_chosen_worker(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b"))
    router.index("a")
    router.index("b")
    router.hold("b", [1, 2, 3])
    response = await router.route(request([1, 2, 3, 4], tokens=4 * PAGE_SIZE + 3))
    assert response.placement.decode.id == "b"
    assert response.expected.cached.device == 3 * PAGE_SIZE
    assert router.worker("b").queued_prefill_tokens == PAGE_SIZE + 3
    assert router.worker("b").indexed_blocks == 3
    assert router.worker("a").indexed_blocks == 0
    router.report(response.lease.id, ended=True)
    # What is evicted counts no more.
    router.hold("b", [2, 3], sequence=2, kind=Kind.REMOVED)
    response = await router.route(request([1, 2, 3, 4], tokens=4 * PAGE_SIZE + 3))
    assert response.expected.cached.device == PAGE_SIZE


async def test_workers_that_the_index_knew_first_are_linked(router: Router) -> None:
    router.index("b")
    router.hold("b", [1, 2, 3])
    router.put(worker_info("a"), worker_info("b"))
    response = await router.route(request([1, 2, 3], tokens=3 * PAGE_SIZE + 3))
    assert response.placement.decode.id == "b"
    assert response.expected.cached.device == 3 * PAGE_SIZE


async def test_different_prompts_at_once_spread(router: Router) -> None:
    router.put(*(worker_info(f"w{n}") for n in range(8)))
    asked = [await router.ask(request(list(range(100 * n, 100 * n + 60)), tokens=1000)) for n in range(1, 9)]
    counts = Counter(task.result().placement.decode.id for task in asked)
    assert set(counts.values()) == {1}


async def test_a_request_waits_for_a_busy_worker_and_goes_when_it_is_free(router: Router) -> None:
    router.put(worker_info("a"))
    first = await router.route(request([1, 2], tokens=8000))
    second = await router.ask(request([3, 4], tokens=8000))
    assert not second.done()
    assert router.service.state().held == 1
    router.report(first.lease.id, prefill_done=True, output_tokens=1)
    await router.turns()
    assert second.done()
    assert router.service.state().held == 0
    assert second.result().placement.decode.id == "a"


async def test_a_waiting_request_leaves_at_once_on_cancel(router: Router) -> None:
    router.put(worker_info("a"))
    first = await router.route(request(tokens=8000))
    waiting = [await router.ask(request(tokens=8000)) for _ in range(3)]
    assert router.service.state().held == 3
    waiting[1].cancel()
    await router.turns()
    assert router.service.state().held == 2
    assert router.routing.models["tiny"].selector.held == 2
    for task in (waiting[0], waiting[2]):
        task.cancel()
    await router.turns()
    assert router.service.state().held == 0
    router.report(first.lease.id, ended=True)
    assert router.service.state().leases == 0, "nobody was placed in vain"


async def test_a_route_cancelled_as_it_is_placed_gives_its_lease_back(router: Router) -> None:
    router.put(worker_info("a"))
    task = asyncio.ensure_future(router.service.route(request()))
    # The task asks, and the turn ends; the task has not heard of it.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    assert router.service.state().leases == 1
    task.cancel()
    await router.turns()
    assert task.cancelled()
    assert router.service.state().leases == 0


async def test_who_waits_is_told_when_the_workers_leave(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b", model="other"))
    await router.route(request(tokens=8000, model="tiny"))
    waiting = await router.ask(request(tokens=8000, model="tiny"))
    assert not waiting.done()
    router.members.drop("a")
    await router.turns()
    with pytest.raises(KvmeshError) as caught:
        waiting.result()
    assert caught.value.code == ErrorCode.ERROR_CODE_NO_WORKER_READY
    assert router.service.state().held == 0


async def test_models_stay_apart(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b", model="big"))
    first = await router.route(request(model="tiny", tokens=8000))
    # The other one's queue is not this one's.
    other = await router.route(request(model="big", tokens=8000))
    assert (first.placement.decode.id, other.placement.decode.id) == ("a", "b")
    state = router.service.state()
    assert [(w.info.id, w.leases) for w in state.workers] == [("a", 1), ("b", 1)]
    assert state.leases == 2


async def test_a_request_may_name_its_policy(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b"))
    assert (await router.route(request(policy="round-robin"))).policy == "round-robin"
    assert (await router.route(request())).policy == "kv"
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(policy="nope"))
    assert caught.value.param == "policy"
    assert router.service.state().leases == 2, "a refused request leaves nothing behind"
    assert router.service.state().held == 0


async def test_an_unknown_policy_is_refused_at_the_start() -> None:
    with pytest.raises(KvmeshError, match="unknown policy"):
        Router(policy="nope")


async def test_policy_and_temperature_change_at_run_time(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b"))
    router.routing.configure(ConfigureRequest(policy="round-robin", temperature=0.5), "test")
    placed = [await router.route(request()) for _ in range(2)]
    assert {p.policy for p in placed} == {"round-robin"}
    assert router.routing.models["tiny"].selector.temperature == 0.5
    assert router.service.state().policy == "round-robin"
    for wrong in (
        ConfigureRequest(policy="nope"),
        ConfigureRequest(policy="random", temperature=-1.0),
        ConfigureRequest(policy="random", temperature=float("nan")),
        ConfigureRequest(policy="random", max_wait_s=0.0),
        ConfigureRequest(policy="random", shadow=PolicyNames(names=["kv", "nope"])),
    ):
        with pytest.raises(KvmeshError):
            router.routing.configure(wrong, "test")
    assert router.service.state().policy == "round-robin"
    # Models that come later, too.
    router.put(worker_info("c", model="big"))
    assert router.routing.models["big"].selector.temperature == 0.5


async def test_queue_bounds_change_at_run_time() -> None:
    router = Router(max_waiting=100, max_wait_s=10.0)
    router.put(worker_info("a"))
    await router.route(request(tokens=8000))
    # Plans hold the first of them, the others stand in line.
    waiting = [await router.ask(request(tokens=8000)) for _ in range(60)]
    before = router.service.state().held
    assert before > 50
    placed = len(waiting) - before
    answer = router.routing.configure(ConfigureRequest(max_waiting=5, max_wait_s=3.0), "test").to_proto()
    assert (answer.max_waiting, answer.max_wait_s) == (5, 3.0)
    await router.turns()
    errors = [task.exception() for task in waiting if task.done()]
    refused = [error for error in errors if isinstance(error, KvmeshError)]
    assert {error.code for error in refused} == {ErrorCode.ERROR_CODE_RATE_LIMITED}
    held = router.service.state().held
    assert held == before - len(refused)
    assert 5 <= held < before
    # One that comes now waits for three seconds, one that was there for ten.
    late = await router.ask(request(tokens=8000, priority=10))
    await router.wait(3.1)
    assert late.done()
    assert router.service.state().held > 0
    await router.wait(7.0)
    assert router.service.state().held == 0
    assert sum(task.exception() is None for task in (late, *waiting)) == placed


async def test_a_failed_worker_is_avoided(router: Router) -> None:
    router.put(worker_info("p", Role.ROLE_PREFILL), worker_info("d", Role.ROLE_DECODE), worker_info("a"))
    for _ in range(10):
        response = await router.route(request(exclude_worker_ids=["p", "unheard of"]))
        assert response.placement.decode.id == "a"
        router.report(response.lease.id, ended=True)
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(exclude_worker_ids=["a", "p"]))
    assert caught.value.code == ErrorCode.ERROR_CODE_NO_WORKER_READY
    assert caught.value.retry_after_ms


async def test_a_draining_worker_gets_nothing_new(router: Router) -> None:
    router.put(worker_info("a"), worker_info("b"))
    router.put(worker_info("a", state=WorkerState.WORKER_STATE_DRAINING))
    placed = [await router.route(request(policy="random")) for _ in range(20)]
    assert {response.placement.decode.id for response in placed} == {"b"}


async def test_a_restarted_worker_is_empty(router: Router) -> None:
    router.put(worker_info("a", incarnation=1))
    lease = (await router.route(request())).lease.id
    router.put(worker_info("a", incarnation=2))
    assert router.slots("a") == (0, 0, 0)
    assert router.report(lease, ended=True)
    assert router.slots("a") == (0, 0, 0)
    assert (await router.route(request())).placement.decode.incarnation == 2


async def test_leases_of_a_caller_that_is_gone_end_soon(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.router.leases.ORPHANED_S", 0.0)
    router.put(worker_info("a"))
    leases = [(await router.route(request(policy="random"))).lease.id for _ in range(2)]
    waiting = await router.ask(request(tokens=1000))
    router.routing.leases.orphan(leases)
    router.now += 1.0
    # This one's holder has come back.
    assert router.report(leases[0], prefill_done=True)
    await asyncio.sleep(0.01)
    await router.turns()
    assert waiting.done(), "the worker is free"
    assert not router.report(leases[1])
    assert router.report(leases[0])


async def test_the_timer_places_and_reclaims_by_itself() -> None:
    router = Router(lease_ttl_s=0.3)
    loop = asyncio.get_running_loop()
    router.routing.turns.clock = loop.time
    router.routing.turns.began = loop.time()
    router.service.start()
    router.put(worker_info("a"))
    await router.route(request([1], tokens=1000))
    # Nobody reports: it goes where the first is expected to be over.
    async with asyncio.timeout(20):
        await router.route(request([2], tokens=1000))
    await eventually(lambda: not router.service.state().leases, timeout=20)
    assert router.service.state().leases_expired_total == 2
    router.service.close()


async def test_an_overload_is_refused_with_a_time_to_retry() -> None:
    router = Router(max_waiting=4, max_wait_s=5.0)
    router.put(worker_info("a"))
    asked = [await router.ask(request([n + 1], tokens=100_000)) for n in range(30)]
    full = [task for task in asked if task.done() and task.exception() is not None]
    assert full, "more than may wait"
    for task in full:
        error = task.exception()
        assert isinstance(error, KvmeshError)
        assert error.code == ErrorCode.ERROR_CODE_RATE_LIMITED
        assert error.retry_after_ms > 0
    assert len(full) == 30 - 1 - 4
    # Nobody ever reports: those that wait are told in time.
    for _ in range(8):
        await router.wait(1.0)
    assert all(task.done() for task in asked)
    assert sum(task.exception() is None for task in asked) == 1
    state = router.service.state()
    assert (state.held, state.leases) == (0, 1)


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(router: Router) -> None:
    router.put(worker_info("a"))
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(tokens=8000, deadline_ms=50))
    assert caught.value.code == ErrorCode.ERROR_CODE_RATE_LIMITED
    assert router.service.state().held == router.service.state().leases == 0
    await router.route(request(tokens=8000, deadline_ms=50_000))


async def test_requests_leave_the_line_by_priority_and_tenant() -> None:
    router = Router(policy="random", tenant_weights={"big": 10.0})
    router.put(worker_info("a"))
    # Each of them fills the pool.
    done = await router.ask(request(tokens=100_000))
    waiting = {
        name: await router.ask(request(tokens=100_000, priority=priority, tenant=tenant))
        for name, priority, tenant in (
            ("late", -5, ""),
            ("small", 0, "small"),
            ("small too", 0, "small"),
            ("big", 0, "big"),
            ("big too", 0, "big"),
            ("urgent", 5, ""),
        )
    }
    left = []
    while waiting:
        router.report(done.result().lease.id, ended=True)
        await router.turns()
        await router.wait(0.1)
        ((name, done),) = [(name, task) for name, task in waiting.items() if task.done()]
        left.append(name)
        del waiting[name]
    assert (left[0], left[-1]) == ("urgent", "late")
    assert left.index("big too") < left.index("small too")


async def test_stopping_answers_those_that_wait(router: Router) -> None:
    router.put(worker_info("a"))
    await router.route(request(tokens=8000))
    waiting = await router.ask(request(tokens=8000))
    router.service.close()
    await router.turns()
    with pytest.raises(KvmeshError) as caught:
        waiting.result()
    assert caught.value.code == ErrorCode.ERROR_CODE_UNAVAILABLE


async def test_rates_are_learned_and_shown(router: Router) -> None:
    router.put(worker_info("a"))
    for number in range(40):
        response = await router.route(request([number + 1], tokens=2000))
        await router.wait(0.4)
        router.report(response.lease.id, prefill_done=True, output_tokens=1)
        await router.wait(1.0)
        router.report(response.lease.id, output_tokens=101, ended=True)
    rates = router.routing.models["tiny"].rates()
    (of,) = rates.classes
    assert of.hardware_class == "mock/unknown/tiny"
    laws = {law.name: law for law in of.laws}
    prefill = laws["prefill"].coefficients
    assert laws["prefill"].observations >= 38
    assert prefill["pass"] + 2000 * prefill["token"] + 4e6 * prefill["token_squared"] == pytest.approx(
        400, rel=0.1
    )
    assert laws["prefill"].error < 0.2
    assert laws["decode"].coefficients["step"] + laws["decode"].coefficients["stream"] == pytest.approx(
        10, rel=0.2
    )
    assert rates.predictions == 40
    assert rates.actual_ms == pytest.approx(400, rel=0.01)
    (worker,) = rates.workers
    assert worker.worker_id == "a"
    assert 0.5 < worker.slowness < 2
    assert worker.observations == 39
    assert 0 < worker.error < 0.5


async def test_transfers_are_learned_from_what_engines_measured(router: Router) -> None:
    router.put(worker_info("p", Role.ROLE_PREFILL), worker_info("d", Role.ROLE_DECODE))
    for number in range(200):
        response = await router.route(request([number + 1], tokens=2000))
        await router.wait(0.5)
        # 400 ms of computing, 100 ms on the way.
        router.report(response.lease.id, prefill_done=True, transfer_ms=100.0)
        router.report(response.lease.id, output_tokens=1)
        await router.wait(1.0)
        router.report(response.lease.id, output_tokens=20, ended=True)
    rates = router.routing.models["tiny"].rates()
    (link,) = rates.links
    assert (link.prefill_id, link.decode_id, link.slowness, link.observations) == ("p", "d", 1.0, 200)
    laws = {law.name: law.coefficients for law in rates.classes[0].laws}
    assert laws["transfer"]["request"] + 2000 * laws["transfer"]["token"] == pytest.approx(100, rel=0.1)
    prefill = laws["prefill"]
    assert prefill["pass"] + 2000 * prefill["token"] + 4e6 * prefill["token_squared"] == pytest.approx(
        400, rel=0.1
    )
