"""Reports that came here on leases of other replicas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmesh.v1.replicas_pb2 import ForwardedReport
from kvmesh.v1.router_pb2 import LeaseReport

# Reports kept, and reports in one message; whoever holds leases says again how they fare.
MOST_KEPT = 65_536
MOST_SENT = 4_096


@dataclass(slots=True)
class _Kept:
    owner: str
    number: int
    report: LeaseReport


class Forwarded:
    """Keeps them until their owners have taken them: for each lease one, with all that was said."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._unsent: dict[int, _Kept] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def unsent(self) -> bool:
        """Whether some have not been sent yet."""
        return bool(self._unsent)

    def add(self, owner: str, report: LeaseReport) -> bool:
        """Keep a report for `owner`; False where too many are kept."""
        lease = report.lease_id
        kept = self._kept.get(lease)
        if kept is None and len(self._kept) >= MOST_KEPT:
            return False
        self._number += 1
        said = merged(kept.report, report) if kept is not None else report
        self._kept[lease] = self._unsent[lease] = _Kept(owner, self._number, said)
        return True

    def due(self, *, again: bool = False) -> list[ForwardedReport]:
        """What has not been sent yet; with `again` all that has not been taken."""
        if again:
            self._unsent = dict(self._kept)
        sent = list(self._unsent)[:MOST_SENT]
        return [self._proto(self._unsent.pop(lease)) for lease in sent]

    def taken(self, numbers: Iterable[int]) -> int:
        """Owners have taken these; how many they were."""
        of = set(numbers)
        done = [lease for lease, kept in self._kept.items() if kept.number in of]
        for lease in done:
            del self._kept[lease]
            self._unsent.pop(lease, None)
        return len(done)

    def drop(self, owner: str) -> None:
        """An owner is gone."""
        for lease in [lease for lease, kept in self._kept.items() if kept.owner == owner]:
            del self._kept[lease]
            self._unsent.pop(lease, None)

    @staticmethod
    def _proto(kept: _Kept) -> ForwardedReport:
        return ForwardedReport(replica_id=kept.owner, number=kept.number, report=kept.report)


def merged(old: LeaseReport, new: LeaseReport) -> LeaseReport:
    """What two reports on a lease say together."""
    return LeaseReport(
        lease_id=new.lease_id,
        prefill_done=old.prefill_done or new.prefill_done,
        output_tokens=max(old.output_tokens, new.output_tokens),
        ended=old.ended or new.ended,
        transfer_ms=old.transfer_ms or new.transfer_ms,
    )
