"""What one replica says to the others and hears of them: messages in and out, no clock and no network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
from google.protobuf.message import DecodeError

from kvmesh.common.metrics import RouterMetrics
from kvmesh.router.leases import Leases, Settle
from kvmesh.router.model import Model
from kvmesh.router.replicas.foreign import Foreign
from kvmesh.router.replicas.ledger import Ledger
from kvmesh.router.replicas.mirror import Mirror, Verdict
from kvmesh.router.replicas.reports import MOST_KEPT, Forwarded, merged
from kvmesh.v1.replicas_pb2 import LeaseBatch, ReplicaMessage, ReportsTaken, Taken
from kvmesh.v1.router_pb2 import LeaseReport, ReplicaState

log = structlog.get_logger()

# Between heartbeats.
BEAT_MS = 250.0
# A replica that is not heard for so long is gone.
SILENT_MS = 3_000.0
# Between two demands of a snapshot, and between two snapshots: those under way are waited for.
RESYNC_MS = 50.0
# Batches whose acknowledgement is waited for, to know how far behind others are.
_MOST_UNTAKEN = 65_536


@dataclass(slots=True)
class Peer:
    """Another replica that is heard."""

    mirror: Mirror
    heard_ms: float
    # What it has of this replica's batches, and whether it wants them all anew.
    taken: int = 0
    resync: bool = False
    asked_ms: float = -RESYNC_MS
    # Its reports, to be acknowledged.
    reports: list[int] = field(default_factory=list)


class Gossip:
    """Implements `leases.Others`. Belongs to one event loop; no call blocks.

    `send` publishes a message, or loses it; `wake` asks for `flush` some milliseconds later. Times are in
    milliseconds.
    """

    def __init__(
        self,
        me: str,
        incarnation: int,
        models: Mapping[str, Model],
        leases: Leases,
        *,
        now: Callable[[], float],
        settle: Settle,
        send: Callable[[bytes], None],
        wake: Callable[[], None],
        metrics: RouterMetrics,
    ) -> None:
        self.me = me
        self.incarnation = incarnation
        self._leases = leases
        self._now = now
        self._send = send
        self._wake = wake
        self._metrics = metrics
        self._peers: dict[str, Peer] = {}
        self._ledger = Ledger(leases)
        self._forwarded = Forwarded()
        # Reports on leases nobody has told of (yet), and until when they are kept.
        self._unclaimed: dict[int, tuple[LeaseReport, float]] = {}
        # Batches that not all have taken, and when they were told.
        self._untaken: deque[tuple[int, float]] = deque(maxlen=_MOST_UNTAKEN)
        self._snapshot_ms = -RESYNC_MS
        self.foreign = Foreign(me, models, leases, now, settle)

    def held(self) -> int:
        return len(self.foreign.ids())

    # What this replica's leases do.

    def changed(self, lease: int, *, soon: bool) -> None:
        if self._peers:
            self._ledger.changed(lease)
            if soon:
                self._wake()

    def expired(self, lease: int) -> None:
        self.foreign.expired(lease)

    def report(self, report: LeaseReport) -> bool:
        if not self._peers:
            return False
        owner = self.foreign.owner(report.lease_id)
        if owner is None:
            self._keep(report)
            return False
        self.foreign.report(report, here=True)
        if self._forwarded.add(owner, report):
            self._metrics.replica_reports.labels("forwarded").inc()
        self._wake()
        return True

    # Time.

    def flush(self) -> None:
        """Say what is due."""
        said = False
        for batch in self._ledger.batches():
            self._tell(batch)
            said = True
        if not said and self._due():
            self._tell()

    def beat(self) -> None:
        """Every `BEAT_MS`: say that this replica lives and how far it is; give up those that do not."""
        now = self._now()
        for replica, peer in list(self._peers.items()):
            if now - peer.heard_ms > SILENT_MS:
                log.warning("replica lost", replica=replica, leases=len(peer.mirror))
                self._lose(replica)
        for lease in [lease for lease, (_, until) in self._unclaimed.items() if until < now]:
            del self._unclaimed[lease]
            self._metrics.replica_reports.labels("dropped").inc()
        self.flush()
        self._tell(again=True)

    def leave(self) -> None:
        """Say that this replica goes."""
        if self._peers:
            self._tell(leaving=True)

    # What others say.

    def receive(self, payload: bytes) -> None:
        try:
            message = ReplicaMessage.FromString(payload)
        except DecodeError:
            log.warning("unreadable message of a replica", bytes=len(payload))
            return
        if message.replica_id == self.me or not message.replica_id:
            return
        peer = self._peer(message)
        if peer is None:
            return
        peer.heard_ms = self._now()
        if message.leaving:
            log.info("replica left", replica=message.replica_id)
            self._lose(message.replica_id)
            return
        self._judge(peer, peer.mirror.receive(message))
        for taken in message.taken:
            if (taken.replica_id, taken.incarnation) == (self.me, self.incarnation):
                self._on_taken(peer, taken)
        self._claim(message)
        for forwarded in message.reports:
            if forwarded.replica_id == self.me:
                peer.reports.append(forwarded.number)
                self._on_report(message.replica_id, forwarded.report)
            elif self.foreign.owner(forwarded.report.lease_id) is not None:
                self.foreign.report(forwarded.report, here=False)
        for said in message.reports_taken:
            if (said.replica_id, said.incarnation) == (self.me, self.incarnation):
                self._metrics.replica_reports.labels("taken").inc(self._forwarded.taken(said.numbers))
        if peer.reports:
            self._wake()

    # State.

    def state(self) -> list[ReplicaState]:
        """The others."""
        return [
            ReplicaState(
                id=replica,
                incarnation=peer.mirror.incarnation,
                leases=len(peer.mirror),
                in_sync=peer.mirror.whole and not peer.resync and peer.taken == self._ledger.sequence,
                lag_ms=self._lag(peer),
            )
            for replica, peer in sorted(self._peers.items())
        ]

    def lag_ms(self) -> float:
        """How long ago the first batch was told that not all others have taken; 0 when they have all."""
        return max((self._lag(peer) for peer in self._peers.values()), default=0.0)

    @property
    def peers(self) -> int:
        return len(self._peers)

    # Others.

    def _peer(self, message: ReplicaMessage) -> Peer | None:
        """Who says it; None for what a former life says."""
        replica, life = message.replica_id, message.incarnation
        peer = self._peers.get(replica)
        if peer is not None and life != peer.mirror.incarnation:
            if life < peer.mirror.incarnation:
                return None
            self._lose(replica)
            peer = None
        if peer is None and not message.leaving:
            log.info("replica found", replica=replica, incarnation=f"{life:x}")
            peer = self._peers[replica] = Peer(Mirror(replica, life, self.foreign), self._now())
            self._ledger.begin()
            # So that it finds this one.
            self._tell()
        return peer

    def _lose(self, replica: str) -> None:
        peer = self._peers.pop(replica)
        self._forwarded.drop(replica)
        if not self._peers:
            self._ledger.stop()
            self._untaken.clear()
        kept = self.foreign.lose(replica)
        self._metrics.replica_takeovers.inc(kept)
        log.info("leases of a replica ended", replica=replica, ended=len(peer.mirror) - kept, taken_over=kept)

    def _judge(self, peer: Peer, verdict: Verdict) -> None:
        self._metrics.replica_messages.labels(verdict.value).inc()
        if verdict not in (Verdict.GAP, Verdict.DIVERGED):
            return
        now = self._now()
        if now - peer.asked_ms >= RESYNC_MS:
            peer.asked_ms = now
            self._metrics.replica_resyncs.labels(verdict.value).inc()
            self._tell()

    def _on_taken(self, peer: Peer, taken: Taken) -> None:
        peer.taken, peer.resync = taken.sequence, taken.resync
        least = min(peer.taken for peer in self._peers.values())
        while self._untaken and self._untaken[0][0] <= least:
            self._untaken.popleft()
        if not peer.resync or self._now() - self._snapshot_ms < RESYNC_MS:
            return
        self._snapshot_ms = self._now()
        for part in self._ledger.snapshot():
            self._tell(part)
        for other in self._peers.values():
            other.resync = False

    def _on_report(self, sender: str, report: LeaseReport) -> None:
        """What was reported to `sender` of a lease that it takes for this replica's."""
        if self._leases.get(report.lease_id) is not None:
            self._leases.report([report])
        elif self.foreign.owner(report.lease_id) not in (None, sender):
            self.report(report)

    def _keep(self, report: LeaseReport) -> None:
        """Its owner may be about to tell of the lease."""
        lease = report.lease_id
        known = self._unclaimed.get(lease)
        if known is not None:
            report = merged(known[0], report)
        elif len(self._unclaimed) >= MOST_KEPT:
            return
        self._unclaimed[lease] = report, self._now() + SILENT_MS

    def _claim(self, message: ReplicaMessage) -> None:
        """Reports may have waited for what the message tells; or it tells of leases that ended here, as their
        owner has not heard of it, or is another one by now."""
        for told in message.batch.opened:
            waiting = self._unclaimed.pop(told.lease_id, None)
            if waiting is not None:
                self.report(waiting[0])
            elif self.foreign.ended(told.lease_id):
                self.report(LeaseReport(lease_id=told.lease_id, ended=True))

    def _lag(self, peer: Peer) -> float:
        first = next((at for sequence, at in self._untaken if sequence > peer.taken), None)
        return self._now() - first if first is not None else 0.0

    # Messages.

    def _due(self) -> bool:
        return self._forwarded.unsent or any(peer.reports for peer in self._peers.values())

    def _tell(self, batch: LeaseBatch | None = None, *, again: bool = False, leaving: bool = False) -> None:
        message = ReplicaMessage(
            replica_id=self.me,
            incarnation=self.incarnation,
            sequence=self._ledger.sequence,
            digest=self._ledger.digest,
            batch=batch,
            reports=self._forwarded.due(again=again),
            leaving=leaving,
        )
        for replica, peer in self._peers.items():
            mirror = peer.mirror
            message.taken.add(
                replica_id=replica,
                incarnation=mirror.incarnation,
                sequence=mirror.sequence,
                resync=not mirror.whole,
            )
            if peer.reports:
                message.reports_taken.append(
                    ReportsTaken(replica_id=replica, incarnation=mirror.incarnation, numbers=peer.reports)
                )
                peer.reports = []
        if batch is not None and self._peers and batch.part == 0:
            self._untaken.append((self._ledger.sequence, self._now()))
        self._send(message.SerializeToString())
