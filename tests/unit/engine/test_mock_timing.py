"""The timing model, and steps that keep to it on a virtual clock."""

from __future__ import annotations

import pytest

from kvmesh.common.served import MockConfig
from kvmesh.engine.contract import Role
from kvmesh.engine.mock.timing import Pacer, TimingModel


class Clock:
    """Time that passes only in sleeps, each of which is late."""

    def __init__(self, late_s: float) -> None:
        self.now = 100.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late_s


def test_model() -> None:
    config = MockConfig(
        prefill_base_ms=10,
        prefill_token_ms=0.5,
        decode_base_ms=8,
        decode_sequence_ms=2,
        transfer_gib_s=2,
        speedup=4,
    )
    model = TimingModel(config)
    assert model.prefill_s(100) == pytest.approx(0.060 / 4)
    assert model.decode_s(6) == pytest.approx(0.020 / 4)
    assert model.transfer_s(1 << 30) == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("role", list(Role))
def test_a_probe_says_the_model(role: Role) -> None:
    model = TimingModel(MockConfig(block_bytes=1 << 20, page_size=16, speedup=2))
    probe = model.probe(role, embeds=False)
    assert all(ms == pytest.approx((5 + 0.02 * tokens) / 2) for tokens, ms in probe.prefill)
    assert all(ms == pytest.approx((6 + 0.1 * streams) / 2) for streams, _, ms in probe.decode)
    # 64 KiB a token, at 10 GiB/s.
    assert all(ms == pytest.approx(tokens / 16 / 10240 * 1000 / 2) for tokens, ms in probe.transfer)
    measured = [bool(law) for law in (probe.prefill, probe.decode, probe.transfer)]
    assert measured == [role is not Role.DECODE, role is not Role.PREFILL, role is Role.PREFILL]
    assert model.probe(role, embeds=True).decode == ()


async def test_late_timers_do_not_add_up() -> None:
    clock = Clock(late_s=0.002)
    pacer = Pacer(clock, clock.sleep)
    pacer.rest()
    for _ in range(100):
        await pacer.step(0.010)
    assert clock.now == pytest.approx(101.0 + clock.late_s)


async def test_a_rest_is_not_made_up_for() -> None:
    clock = Clock(late_s=0.0)
    pacer = Pacer(clock, clock.sleep)
    await pacer.step(0.010)
    clock.now += 0.005
    pacer.rest()
    began = clock.now
    await pacer.step(0.010)
    assert clock.now == pytest.approx(began + 0.010)


async def test_a_stall_is_not_hurried_after() -> None:
    clock = Clock(late_s=0.0)
    pacer = Pacer(clock, clock.sleep)
    await pacer.step(0.010)
    clock.now += 5.0
    began = clock.now
    await pacer.step(0.010)
    assert clock.now == pytest.approx(began + 0.010)
