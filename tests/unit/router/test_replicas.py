"""Replicas agree on leases, whatever the wire between them does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest

from fixtures.holders import PAGE_SIZE, worker_info
from fixtures.replicas import STEP_S, Replica, Wire
from fixtures.routing import request
from kvmesh.router.replicas.gossip import SILENT_MS
from kvmesh.v1.common_pb2 import Role
from kvmesh.v1.router_pb2 import LeaseDigest, RouteResponse

SILENT_S = SILENT_MS / 1000
# What is promised.
DRIFT_S = 1.0
# For so long blocks of a prompt that is known to be computed may still be waited for, and a tick.
GRACE_S = 3.1


def workers() -> Iterator:
    yield worker_info("p", Role.ROLE_PREFILL)
    yield worker_info("d", Role.ROLE_DECODE)
    yield worker_info("a")
    yield worker_info("b")


def begin(wire: Wire, name: str, **config: object) -> Replica:
    replica = wire.start(name, **{"policy": "random", **config})
    replica.put(*workers())
    return replica


@pytest.fixture
async def pair() -> tuple[Wire, Replica, Replica]:
    wire = Wire()
    here, there = begin(wire, "here"), begin(wire, "there")
    await wire.run(DRIFT_S)
    return wire, here, there


async def test_a_lease_is_counted_everywhere_through_its_life(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    blocks = list(range(1, 40))
    placed = await here.route(request(blocks, tokens=39 * PAGE_SIZE))
    lease, computes = placed.lease.id, placed.placement.prefill.id or placed.placement.decode.id
    await wire.run(0.05)
    assert wire.agreed()
    assert there.digest() == LeaseDigest(
        leases=1, lease_sum=lease, speculative_blocks=39, speculative_sum=sum(blocks)
    )
    # Its prefix is being computed where the other replica sent it, and others had better go elsewhere.
    again = request([*blocks, 77], tokens=40 * PAGE_SIZE, policy="kv", explain=True)
    cached = {c.prefill_id or c.decode_id: c.cached.device for c in there.routing.select(again).candidates}
    assert cached == {"p": 0, "a": 0, "b": 0} | {computes: 39 * PAGE_SIZE}
    other = there.routing.select(request(list(range(100, 140)), tokens=40 * PAGE_SIZE, policy="kv"))
    assert (other.placement.prefill.id or other.placement.decode.id) != computes
    here.report(lease, prefill_done=True, output_tokens=1)
    await wire.run(0.05)
    assert wire.agreed()
    here.report(lease, output_tokens=100)
    await wire.run(0.3)
    assert wire.agreed()
    here.report(lease, ended=True)
    await wire.run(0.05)
    assert wire.agreed()
    assert there.digest().leases == 0


async def test_alone_a_replica_says_that_it_lives_and_no_more() -> None:
    wire = Wire()
    alone = begin(wire, "alone")
    lease = (await alone.route(request())).lease.id
    alone.report(lease, prefill_done=True)
    await wire.run(2.0)
    assert 7 <= len(alone.sent) <= 9
    assert not any(message.HasField("batch") or message.taken for message in alone.sent)
    late = begin(wire, "late")
    await wire.run(DRIFT_S)
    assert wire.agreed()
    assert late.digest().leases == 1


async def test_what_begins_and_ends_at_once_is_not_told(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, _ = pair
    here.sent.clear()
    lease = (await here.route(request())).lease.id
    here.report(lease, ended=True)
    await wire.run(0.05)
    assert not any(message.HasField("batch") for message in here.sent)


async def test_a_lost_message_is_noticed_and_all_is_told_anew(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    first = (await here.route(request())).lease.id
    await wire.run(0.05)
    wire.loss = 1.0
    lost = (await here.route(request())).lease.id
    here.report(first, ended=True)
    await wire.run(0.02)
    wire.loss = 0.0
    assert not wire.agreed()
    # Without another change, by the next heartbeat.
    await wire.run(0.3)
    assert wire.agreed()
    assert there.digest().lease_sum == lost
    assert there.service.state().replicas[0].in_sync


async def test_a_digest_that_differs_is_noticed(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    lease = (await here.route(request())).lease.id
    await wire.run(0.05)
    # As a fault of this code would.
    there.gossip.foreign._drop(lease, there.gossip.foreign._held[lease])
    assert not wire.agreed()
    here.report(lease, output_tokens=3)
    await wire.run(0.1)
    assert wire.agreed()
    mirror = there.gossip._peers["here"].mirror
    mirror._digest += 1
    await wire.run(0.4)
    assert mirror._digest == here.gossip._ledger.digest


async def test_a_large_state_comes_in_parts() -> None:
    wire = Wire()
    here = begin(wire, "here")
    # More than these do not fit into the workers.
    for first in range(1, 4):
        await here.route(request(list(range(first, 32_760 + first)), tokens=524_160))
    late = begin(wire, "late")
    await wire.run(0.3)
    parts = [message.batch.parts for message in here.sent if message.HasField("batch")]
    assert parts == [3] * len(parts)
    assert max(message.ByteSize() for message in here.sent) < 512 << 10
    assert wire.agreed()
    # A snapshot of which a part was lost is not taken for whole.
    wire.loss = 0.5
    wire.kill("late")
    late = begin(wire, "late")
    await wire.run(1.0)
    wire.loss = 0.0
    await wire.run(DRIFT_S)
    assert wire.agreed()
    assert late.digest().leases == 3


async def test_leases_of_a_replica_that_is_lost_end(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    for _ in range(5):
        await here.route(request())
    own = (await there.route(request())).lease.id
    await wire.run(0.05)
    assert there.digest().leases == 6
    wire.kill("here")
    await wire.run(SILENT_S + 0.3)
    assert there.digest() == LeaseDigest(leases=1, lease_sum=own)
    assert not there.service.state().replicas


async def test_a_replica_that_goes_in_order_is_gone_at_once(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    await here.route(request())
    await wire.run(0.05)
    here.gossip.leave()
    wire.kill("here")
    await wire.run(0.05)
    assert there.digest().leases == 0


async def test_leases_that_are_reported_elsewhere_outlive_their_owner(
    pair: tuple[Wire, Replica, Replica],
) -> None:
    wire, here, there = pair
    third = begin(wire, "third")
    await wire.run(DRIFT_S)
    kept, ended, silent = [(await here.route(request([n]))).lease.id for n in (1, 2, 3)]
    await wire.run(0.05)
    wire.kill("here")
    assert there.report(kept, prefill_done=True, output_tokens=2)
    assert there.report(ended, ended=True)
    assert there.digest().leases == 2, "an end counts at once"
    await wire.run(SILENT_S + 0.5)
    assert there.digest().lease_sum == third.digest().lease_sum == kept != silent
    assert wire.agreed()
    # It is this replica's own: it ends here, or expires.
    assert there.report(kept, ended=True)
    await wire.run(0.1)
    assert there.digest().leases == third.digest().leases == 0


async def test_an_owner_that_was_only_cut_off_gives_up_what_was_taken_over(
    pair: tuple[Wire, Replica, Replica],
) -> None:
    wire, here, there = pair
    moved, stays = [(await here.route(request())).lease.id for _ in range(2)]
    await wire.run(0.05)
    wire.cut.add("here")
    assert there.report(moved, output_tokens=2)
    for _ in range(4):
        await wire.run(SILENT_S / 3)
        here.report(stays, output_tokens=2)
        there.report(moved, output_tokens=2)
    assert there.digest().lease_sum == moved
    wire.cut.clear()
    await wire.run(DRIFT_S)
    assert wire.agreed(speculating=False)
    assert list(here.routing.leases) == [stays]
    assert list(there.routing.leases) == [moved]
    assert there.report(moved, ended=True)
    assert here.report(stays, ended=True)
    await wire.run(GRACE_S)
    assert here.digest() == there.digest() == LeaseDigest()


async def test_a_report_reaches_the_owner_though_messages_are_lost(
    pair: tuple[Wire, Replica, Replica],
) -> None:
    wire, here, there = pair
    lease = (await here.route(request())).lease.id
    await wire.run(0.05)
    wire.loss = 1.0
    assert there.report(lease, prefill_done=True)
    assert there.report(lease, output_tokens=20, ended=True)
    await wire.run(0.4)
    assert list(here.routing.leases) == [lease]
    assert len(there.gossip._forwarded) == 1
    wire.loss = 0.0
    await wire.run(DRIFT_S)
    assert not list(here.routing.leases)
    assert len(there.gossip._forwarded) == 0
    assert wire.agreed()
    assert here.digest().leases == 0


async def test_a_report_may_come_before_the_lease_was_told(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    lease = (await here.route(request())).lease.id
    assert not there.report(lease, ended=True), "not known yet"
    await wire.run(0.1)
    assert here.digest().leases == there.digest().leases == 0
    assert not there.report(12345, ended=True)
    await wire.run(SILENT_S + 0.5)
    assert not there.gossip._unclaimed


async def test_a_lease_weighs_once_its_worker_is_known() -> None:
    wire = Wire()
    here, there = begin(wire, "here"), wire.start("there", policy="random")
    await wire.run(DRIFT_S)
    lease = (await here.route(request(tokens=100))).lease.id
    await wire.run(0.05)
    assert there.digest().leases == 0, "no model is known"
    there.put(worker_info("a", incarnation=7), worker_info("b", incarnation=7))
    there.gossip.foreign.retry()
    assert there.digest().leases == 1
    there.put(*workers())
    there.gossip.foreign.retry()
    assert wire.agreed()
    here.report(lease, ended=True)
    await wire.run(0.05)
    assert wire.agreed()


async def test_a_lease_that_is_renewed_does_not_expire_elsewhere(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, there = pair
    live, dead = [(await here.route(request())).lease.id for _ in range(2)]
    for _ in range(12):
        await wire.run(1.0)
        here.report(live)
    assert wire.agreed()
    assert there.digest().lease_sum == live != dead


async def test_lag_is_the_age_of_what_is_not_taken(pair: tuple[Wire, Replica, Replica]) -> None:
    wire, here, _ = pair
    assert here.gossip.lag_ms() == 0
    wire.cut.add("there")
    await here.route(request())
    await wire.run(1.0)
    assert here.gossip.lag_ms() == pytest.approx(1000, abs=20)
    assert not here.service.state().replicas[0].in_sync
    wire.cut.clear()
    await wire.run(DRIFT_S)
    assert here.gossip.lag_ms() == 0
    assert here.service.state().replicas[0].in_sync


@pytest.mark.parametrize("loss", [0.0, 0.1])
async def test_nobody_drifts_for_a_second_while_load_goes_on(
    pair: tuple[Wire, Replica, Replica], loss: float
) -> None:
    wire, chance = pair[0], Random(1)
    wire.loss = loss
    # When each lease began, and when those ended that have.
    begun: dict[int, float] = {}
    ended: dict[int, float] = {}
    for _ in range(500):
        for replica in pair[1:]:
            if chance.random() < 0.5:
                begun[(await replica.route(request())).lease.id] = wire.now
            live = [lease for lease in begun if lease not in ended]
            if len(live) > 20:
                # Its holder may ask either.
                replica.report(live[0], ended=True)
                ended[live[0]] = wire.now
        await wire.run(STEP_S)
        due = wire.now - DRIFT_S
        for replica in pair[1:]:
            known = {*replica.routing.leases, *replica.gossip.foreign.ids()}
            assert {lease for lease, at in begun.items() if at <= due} - ended.keys() <= known
            assert known.isdisjoint(lease for lease, at in ended.items() if at <= due)
            assert replica.gossip.lag_ms() < DRIFT_S * 1000
    assert len(ended) > 400


@pytest.mark.parametrize("seed", range(8))
async def test_any_program_over_any_wire_ends_in_agreement_within_a_second(seed: int) -> None:
    wire, chance = Wire(seed), Random(seed)
    names = ["r0", "r1", "r2"]
    for name in names:
        begin(wire, name, lease_ttl_s=5.0)
    # Who holds a lease says to whom it likes how it fares.
    held: list[int] = []
    asking: list[tuple[str, asyncio.Task[RouteResponse]]] = []
    for _ in range(6):
        wire.loss = chance.choice([0.0, 0.1, 0.5])
        wire.cut = {name for name in names if chance.random() < 0.2}
        for _ in range(60):
            live = [wire.replicas[name] for name in names if name in wire.replicas]
            asked = chance.choice(live)
            match chance.randrange(6):
                case 0 | 1:
                    blocks = [chance.randrange(1, 50) for _ in range(chance.randrange(1, 9))]
                    tokens = PAGE_SIZE * len(blocks) + 3
                    asking.append((asked.name, await asked.ask(request(blocks, tokens=tokens))))
                case 2 | 3 if held:
                    asked.report(chance.choice(held), prefill_done=True, output_tokens=chance.randrange(40))
                case 4 if held:
                    asked.report(held.pop(chance.randrange(len(held))), ended=True)
                case 5 if chance.random() < 0.1:
                    name = chance.choice(names)
                    if name not in wire.replicas:
                        begin(wire, name, lease_ttl_s=5.0)
                    elif len(live) > 1:
                        wire.kill(name)
                        for _, task in [one for one in asking if one[0] == name]:
                            task.cancel()
                        asking = [one for one in asking if one[0] != name]
                case _:
                    pass
            await wire.run(chance.choice([0.0, 0.01, 0.05]))
            held += [task.result().lease.id for _, task in asking if task.done()]
            asking = [(name, task) for name, task in asking if not task.done()]
    for _, task in asking:
        task.cancel()
    await asyncio.gather(*(task for _, task in asking), return_exceptions=True)
    for name in names:
        if name not in wire.replicas:
            begin(wire, name, lease_ttl_s=5.0)
    wire.loss, wire.cut = 0.0, set()
    healed = wire.now
    # Leases go on expiring, which others hear of a little later: there need be one moment only.
    while not all_told(wire):
        assert wire.now < healed + DRIFT_S
        await wire.run(0.01)
    await wire.run(10.0)
    assert wire.agreed()
    assert all(replica.digest().leases == 0 for replica in wire.replicas.values())


def all_told(wire: Wire) -> bool:
    """Whether every replica knows of the others' leases, and each lease has one owner."""
    owned = [lease for replica in wire.replicas.values() for lease in replica.routing.leases]
    told = [replica.digest().lease_sum == sum(owned) % 2**64 for replica in wire.replicas.values()]
    return len(owned) == len(set(owned)) and all(told)
