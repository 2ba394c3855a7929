"""What prefill and decode workers share: the process around one engine."""

from kvmesh.engine.worker.connection import Connection
from kvmesh.engine.worker.process import AddService, WorkerProcess
from kvmesh.engine.worker.streams import Streams

__all__ = ["AddService", "Connection", "Streams", "WorkerProcess"]
