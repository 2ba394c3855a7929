"""This replica's own leases, as they have been told to the others."""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.router.leases import Leases, Live
from kvmesh.v1.replicas_pb2 import LeaseBatch, LeaseProgress, ToldLease

# Bytes of a batch, about; NATS refuses messages over 1 MiB.
_BATCH_BYTES = 256 << 10
# Blocks told of one prompt: 256 KiB of hashes.
_MOST_BLOCKS = 32_768
# Bytes of a lease without its hashes, about.
_LEASE_BYTES = 128
_MASK = 2**64 - 1


def weight(lease: int, output_tokens: int, *, prefilled: bool) -> int:
    """A lease's part of a digest (`ReplicaMessage.digest`)."""
    return lease * (2 * output_tokens + prefilled + 1) & _MASK


class Ledger:
    """Turns changes of leases into numbered batches. Tells nothing before `begin`.

    What is told is what is true when it is told: a lease that is over by then is never told.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        # By lease, what it adds to the digest.
        self._told: dict[int, int] = {}
        self._due: set[int] = set()
        self.telling = False
        self.sequence = 0
        self.digest = 0

    def begin(self) -> None:
        """Somebody listens. By the digest they see that there is more than they know, and ask for it."""
        if not self.telling:
            self.telling = True
            self._weigh_all()

    def stop(self) -> None:
        """Nobody listens any more."""
        self.telling = False
        self._told.clear()
        self._due.clear()
        self.digest = 0

    def changed(self, lease: int) -> None:
        if self.telling:
            self._due.add(lease)

    def batches(self) -> Iterator[LeaseBatch]:
        """What has changed, in batches; `sequence` and `digest` are those of the last one yielded."""
        due, self._due = self._due, set()
        batch, size = LeaseBatch(), 0
        for lease in due:
            size += self._add(batch, lease)
            if size > _BATCH_BYTES:
                self.sequence += 1
                yield batch
                batch, size = LeaseBatch(), 0
        if size:
            self.sequence += 1
            yield batch

    def snapshot(self) -> list[LeaseBatch]:
        """All leases, as the parts of one batch."""
        self._due.clear()
        self._weigh_all()
        self.sequence += 1
        batch, size = LeaseBatch(), 0
        parts = [batch]
        for lease in self._told:
            if size > _BATCH_BYTES:
                batch, size = LeaseBatch(), 0
                parts.append(batch)
            live = self._leases.get(lease)
            assert live is not None, "told just now"
            told = _told(lease, live)
            batch.opened.append(told)
            size += _LEASE_BYTES + 8 * len(told.block_hashes)
        for number, part in enumerate(parts):
            part.part, part.parts = number, len(parts)
        return parts

    def _weigh_all(self) -> None:
        self._told.clear()
        self.digest = 0
        for lease in self._leases:
            live = self._leases.get(lease)
            assert live is not None, "one of them"
            self._weigh(lease, live)

    def _add(self, batch: LeaseBatch, lease: int) -> int:
        """Add what became of a lease; its bytes, 0 where there is nothing to tell."""
        live = self._leases.get(lease)
        if live is None:
            told = self._told.pop(lease, None)
            if told is None:
                return 0
            self.digest = (self.digest - told) & _MASK
            batch.ended.append(lease)
            return 8
        known = lease in self._told
        self._weigh(lease, live)
        if known:
            batch.progressed.append(
                LeaseProgress(
                    lease_id=lease,
                    prefilled=live.prefilled,
                    output_tokens=live.output_tokens,
                    transfer_ms=live.transfer_ms,
                )
            )
            return 24
        told = _told(lease, live)
        batch.opened.append(told)
        return _LEASE_BYTES + 8 * len(told.block_hashes)

    def _weigh(self, lease: int, live: Live) -> None:
        now = weight(lease, live.output_tokens, prefilled=live.prefilled)
        self.digest = (self.digest - self._told.get(lease, 0) + now) & _MASK
        self._told[lease] = now


def _told(lease: int, live: Live) -> ToldLease:
    placement = live.response.placement
    told = ToldLease(
        lease_id=lease,
        model=live.model.name,
        prompt_tokens=live.prompt_tokens,
        cached=live.response.expected.cached,
        block_hashes=live.request.block_hashes[:_MOST_BLOCKS] if live.request is not None else (),
        prefilled=live.prefilled,
        output_tokens=live.output_tokens,
        takeovers=live.takeovers,
    )
    told.decode.id, told.decode.incarnation = placement.decode.id, placement.decode.incarnation
    if placement.HasField("prefill"):
        told.prefill.id, told.prefill.incarnation = placement.prefill.id, placement.prefill.incarnation
    return told
