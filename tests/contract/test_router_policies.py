"""What every routing policy must do, whatever it prefers: kvmesh's own, and one from outside."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from random import Random

import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.core import POLICIES, Placed, PrefixIndex, Selector
from kvmesh.router import policies
from kvmesh.router.policies import Policies, judge
from kvmesh.router.policies.contract import Candidate, Policy, Request

BLOCK = 16


class FewestRequests(Policy):
    """Stands for a policy of another package."""

    name = "fewest-requests"

    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float]:
        assert request.prompt_tokens > 0
        assert all(candidate.prefill and candidate.decode and candidate.terms for candidate in candidates)
        return [candidate.requests + 0.5 * self._random.random() for candidate in candidates]


class Mesh:
    """A selector with workers, all of one kind, and time in the test's hands."""

    def __init__(self, policy: str, seed: int = 0, outside: Policy | None = None, **config: object) -> None:
        self.index = PrefixIndex()
        self.selector = Selector(self.index, block_tokens=BLOCK, seed=seed, gather_ms=0.0, **config)  # pyright: ignore[reportArgumentType]
        self.policy = policy
        self.names: dict[int, str] = {}
        self.ids: dict[str, int] = {}
        self.holders: dict[str, int] = {}
        self.numbers = itertools.count(1)
        self.now = 0.0
        if outside is not None:
            self.selector.add_policy(outside.name, judge(outside, self.names.__getitem__))

    def add(self, name: str, role: str = "aggregated") -> Mesh:
        # Keys lie as the names do.
        key = int.from_bytes(name.encode().ljust(8, b"\0")[:8], "big")
        worker = self.selector.add_worker(key, role, hardware_class="one", blocks=10_000, pass_tokens=8192)
        self.holders[name] = self.index.add_engine(name)
        self.selector.link(worker, self.holders[name])
        self.names[worker], self.ids[name] = name, worker
        return self

    def remove(self, name: str) -> None:
        self.selector.remove_worker(self.ids[name])

    def submit(self, blocks: Sequence[int] = (), tokens: int = 1000, **request: object) -> Placed:
        """A placement; the request is over before the next, unless `keep` is true."""
        keep = request.pop("keep", False)
        self.now += 1000.0
        outcomes = self.selector.submit(
            self.now,
            next(self.numbers),
            prompt_tokens=tokens,
            blocks=list(blocks),
            policy=self.policy,
            explain=True,
            **request,  # pyright: ignore[reportArgumentType]
        )
        outcomes += self.selector.tick(self.now + 0.1)[0]
        (placed,) = outcomes
        assert isinstance(placed, Placed)
        self.selector.report(self.now, [(placed.lease, True, 1, 0.0, False)])
        if not keep:
            self.selector.end(self.now, placed.lease)
        return placed

    def goes(self, *arguments: object, **request: object) -> str:
        return self.names[self.submit(*arguments, **request).decode]  # pyright: ignore[reportArgumentType]


Make = Callable[..., Mesh]


@pytest.fixture(params=[*POLICIES, FewestRequests.name])
def make(request: pytest.FixtureRequest) -> Make:
    def make(seed: int = 0) -> Mesh:
        outside = FewestRequests(Random(seed)) if request.param == FewestRequests.name else None
        return Mesh(request.param, seed, outside)

    return make


def aggregated(mesh: Mesh, count: int) -> Mesh:
    for number in range(count):
        mesh.add(f"a{number}")
    return mesh


def pairs(mesh: Mesh, prefills: int, decodes: int) -> Mesh:
    for number in range(prefills):
        mesh.add(f"p{number}", "prefill")
    for number in range(decodes):
        mesh.add(f"d{number}", "decode")
    return mesh


SHAPES: dict[str, Callable[[Mesh], Mesh]] = {
    "one": lambda mesh: aggregated(mesh, 1),
    "five": lambda mesh: aggregated(mesh, 5),
    "pair": lambda mesh: pairs(mesh, 1, 1),
    "pairs": lambda mesh: pairs(mesh, 3, 4),
    "mixed": lambda mesh: pairs(aggregated(mesh, 2), 2, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_winner_is_among_the_cheapest(make: Make, shape: str) -> None:
    mesh = SHAPES[shape](make(1))
    for number in range(20):
        placed = mesh.submit([number + 1], session=number)
        costs = {(prefill, decode): cost for prefill, decode, _, cost, _ in placed.candidates()}
        assert placed.policy == mesh.policy
        lowest = min(costs.values())
        assert math.isfinite(lowest)
        # Near ties are chance's.
        assert costs[placed.prefill, placed.decode] <= lowest + 0.1 + 0.001 * abs(lowest)


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_are_predicted_whatever_the_policy(make: Make, shape: str) -> None:
    mesh = SHAPES[shape](make(1))
    for _, _, _, _, terms in mesh.submit().candidates():
        assert all(math.isfinite(term) and term >= 0 for term in terms)
        assert sum(terms) > 0


def test_a_seed_repeats_every_choice(make: Make) -> None:
    def choices() -> list[str]:
        mesh = pairs(aggregated(make(3), 2), 3, 3)
        return [mesh.goes([number + 1], session=number) for number in range(50)]

    assert choices() == choices()


@pytest.mark.parametrize("shape", ["five", "pairs"])
def test_equal_workers_share_the_load(make: Make, shape: str) -> None:
    mesh = SHAPES[shape](make(4))
    counts = Counter(mesh.goes([number + 1], session=number * 7919 + 1, keep=True) for number in range(400))
    assert len(counts) == {"five": 5, "pairs": 4}[shape]
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_tiny_prompt_does_no_harm(make: Make) -> None:
    mesh = aggregated(make(5), 2)
    assert mesh.goes(tokens=1) in ("a0", "a1")


def test_nobody_is_said(make: Make) -> None:
    mesh = pairs(make(), 2, 0)
    with pytest.raises(LookupError, match="no worker"):
        mesh.submit()
    assert (mesh.selector.leases, mesh.selector.held) == (0, 0)


def test_excluded_workers_win_never(make: Make) -> None:
    mesh = aggregated(make(), 3)
    placed = {mesh.goes([number + 1], session=number, exclude=[mesh.ids["a1"]]) for number in range(50)}
    assert placed == {"a0", "a2"}


def test_round_robin_takes_workers_in_turn() -> None:
    mesh = pairs(Mesh("round-robin"), 2, 3)
    placed = [mesh.submit() for _ in range(12)]
    assert Counter(mesh.names[one.prefill] for one in placed) == {"p0": 6, "p1": 6}
    assert Counter(mesh.names[one.decode] for one in placed) == {f"d{n}": 4 for n in range(3)}


def test_round_robin_follows_membership() -> None:
    mesh = aggregated(Mesh("round-robin"), 2)
    for _ in range(10):
        mesh.submit()
    mesh.add("a2")
    assert Counter(mesh.goes() for _ in range(9)) == {f"a{n}": 3 for n in range(3)}


@pytest.mark.parametrize("policy", ["least-loaded", "power-of-two"])
def test_load_is_avoided(policy: str) -> None:
    mesh = aggregated(Mesh(policy), 2)
    busy = mesh.goes(keep=True)
    idle = ({"a0", "a1"} - {busy}).pop()
    assert {mesh.goes() for _ in range(20)} == {idle}


def test_sessions_stay_and_few_move() -> None:
    mesh = aggregated(Mesh("session"), 8)
    before = {session: mesh.goes(session=session) for session in range(1, 201)}
    assert {session: mesh.goes(session=session) for session in before} == before
    mesh.remove("a3")
    after = {session: mesh.goes(session=session) for session in before}
    assert all(after[session] == worker for session, worker in before.items() if worker != "a3")
    assert "a3" not in after.values()


def test_kv_goes_where_the_prefix_is_unless_the_queue_is_too_long() -> None:
    mesh = aggregated(Mesh("kv", joint=False), 4)
    chain = list(range(1, 101))
    mesh.index.store(mesh.holders["a2"], chain)
    assert {mesh.goes(chain, 1601) for _ in range(20)} == {"a2"}
    # A prompt that takes its worker some 1.7 s.
    others = [worker for name, worker in mesh.ids.items() if name != "a2"]
    assert mesh.selector.submit(
        mesh.now + 999, next(mesh.numbers), prompt_tokens=30_000, blocks=[999], policy="kv", exclude=others
    )
    placed = mesh.submit(chain, 1601)
    assert mesh.names[placed.decode] != "a2"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(KvmeshError, match="did you mean `round-robin`") as caught:
        Policies(Random(0)).check("round_robin")
    assert caught.value.param == "policy"
    with pytest.raises(
        KvmeshError, match="known: kv, least-loaded, power-of-two, random, round-robin, session"
    ):
        Policies(Random(0)).check("zzzz")
    mesh = aggregated(Mesh("zzzz"), 1)
    with pytest.raises(ValueError, match="unknown policy `zzzz`"):
        mesh.submit()


def test_entry_points_add_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        EntryPoint("fewest-requests", f"{__name__}:FewestRequests", policies.ENTRY_POINT_GROUP),
        EntryPoint("broken", f"{__name__}:BLOCK", policies.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(policies, "entry_points", lambda group: found)
    known = Policies(Random(0))
    assert known.names() == sorted(["broken", "fewest-requests", *POLICIES])
    assert isinstance(known.external("fewest-requests"), FewestRequests)
    assert known.external("fewest-requests") is known.external("fewest-requests"), "made once"
    with pytest.raises(KvmeshError, match="is not a Policy"):
        known.check("broken")


class Broken(Policy):
    """Answers in a way that no policy may."""

    name = "broken"
    answer: object = None

    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float]:
        if self.answer is None:
            raise ZeroDivisionError
        return self.answer  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("answer", [None, [], [1.0] * 99, ["x", "y"], [math.nan, 0.0], [math.inf, 0.0]])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_fails_is_judged_by_kv(answer: object) -> None:
    broken = Broken(Random(0))
    broken.answer = answer
    mesh = aggregated(Mesh("broken", outside=broken), 2)
    chain = list(range(1, 101))
    mesh.index.store(mesh.holders["a1"], chain)
    assert {mesh.goes(chain, 1601) for _ in range(10)} == {"a1"}
