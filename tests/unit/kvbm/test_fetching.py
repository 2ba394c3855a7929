"""What is not fetched, and why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fixtures.kvbm import MIB, NAMESPACE, chain, numbers
from fixtures.ports import free_port
from fixtures.waiting import eventually
from kvmesh.common.grpc.client import Channels
from kvmesh.core import StoreClient, StoreServer
from kvmesh.kvbm.fetching import WEIGHT, Fetching
from kvmesh.kvbm.link import Link


@pytest.fixture
async def fetching(tmp_path: Path) -> AsyncIterator[Fetching]:
    socket = str(tmp_path / "kvbm.sock")
    store = StoreServer(socket, 8 * MIB, str(tmp_path))
    client = StoreClient(socket, **NAMESPACE, engine=1, timeout_s=5)
    client.connect()
    link, channels = Link(store), Channels()
    fetching = Fetching(store, link, channels)
    yield fetching
    await fetching.close()
    await channels.close()
    await link.close()
    client.close()
    store.stop()


async def ended(fetching: Fetching) -> dict[str, int]:
    await eventually(lambda: not fetching.under_way, 20)
    return dict(fetching.failed)


async def test_a_link_that_does_not_beat_computing_is_not_used(fetching: Fetching) -> None:
    source, hashes = f"127.0.0.1:{free_port()}", numbers(chain(8))
    fetching.bytes_per_s[source] = 1000.0
    fetching.want(source, "m", hashes, 2.0)
    assert await ended(fetching) == {"slow": 8}
    # It is thought better of little by little, until it is tried: here, nobody is there.
    assert fetching.bytes_per_s[source] == pytest.approx(1000.0 * (1 + WEIGHT))
    failed: dict[str, int] = {}
    while "unreachable" not in failed:
        fetching.want(source, "m", hashes, 60.0)
        failed = await ended(fetching)
    assert failed["unreachable"] == 8
    assert fetching.fetched == 0


async def test_what_nobody_has_asked_for_yet_is_absent(fetching: Fetching) -> None:
    fetching.want("127.0.0.1:1", "another", numbers(chain(3)), 2.0)
    assert await ended(fetching) == {"absent": 3}
    fetching.want("127.0.0.1:1", "m", numbers(chain(3)), 0.0)
    assert await ended(fetching) == {"absent": 3, "late": 3}
