"""Certificates between the mesh's own processes, which may be replaced while they run.

A process shows one certificate on all its connections, as server and as client, and trusts those that the
mesh's authorities have signed. Connections that are open keep what they began with.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
import structlog

from kvmesh.common.config import MeshTlsConfig
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.tasks import cancel

log = structlog.get_logger()

# Seconds between looks at the files, where nobody connects meanwhile.
LOOK_S = 1.0


class WatchedFiles:
    """Says whether any of some files was replaced or written since the last time it was asked."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = [Path(name) for name in files if name]
        self._stamp = self._look()

    def changed(self) -> bool:
        stamp = self._look()
        changed, self._stamp = stamp != self._stamp, stamp
        return changed

    def _look(self) -> list[tuple[int, int, int]]:
        """A missing file is as good as another."""
        found = []
        for file in self._files:
            try:
                stat = file.stat()
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found


class Pem(NamedTuple):
    """What the files held."""

    cert: bytes
    key: bytes
    ca: bytes


class MeshTls:
    """The certificates of this process; new connections get what the files held last.

    A replacement that cannot be used is logged and the last good one kept. May be used from any thread but
    for `watch` and `close`.
    """

    def __init__(self, config: MeshTlsConfig) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) where the files cannot be used."""
        self.config = config
        self._files = WatchedFiles((config.cert, config.key, config.ca))
        self._context = _context(config)
        self.pem = self._read()
        # Grows with every replacement.
        self.version = 0
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, config: MeshTlsConfig) -> MeshTls | None:
        """None where connections are plain."""
        return cls(config) if config.cert else None

    @property
    def require_client(self) -> bool:
        return self.config.client_auth == "require"

    @property
    def channel_options(self) -> list[tuple[str, str]]:
        """What channels with `channel_credentials` need beside."""
        name = self.config.server_name
        return [("grpc.ssl_target_name_override", name)] if name else []

    def channel_credentials(self) -> grpc.ChannelCredentials:
        self.refresh()
        return grpc.ssl_channel_credentials(self.pem.ca, self.pem.key, self.pem.cert)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Each new connection is offered what the files hold then."""
        return grpc.dynamic_ssl_server_credentials(
            self._server_configuration(),
            self._fresh_configuration,
            require_client_authentication=self.require_client,
        )

    def context(self) -> ssl.SSLContext:
        """For clients of other libraries; its next connections, too, show what the files hold then."""
        self.refresh()
        return self._context

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback`, from any thread, after each replacement from now on, while somebody watches or
        connects. It may raise KvmeshError."""
        self._callbacks.append(callback)

    def refresh(self) -> None:
        """Take over what the files hold, if they have changed."""
        with self._lock:
            if not self._files.changed():
                return
            try:
                # All the files must fit together before any is taken.
                _context(self.config)
                _load(self._context, self.config)
                self.pem = self._read()
                self.version += 1
                for callback in self._callbacks:
                    callback()
            except KvmeshError as error:
                log.error("certificate not replaced", error=error.message)
                return
        log.info("certificate loaded anew", cert=self.config.cert)

    def watch(self) -> None:
        """Look at the files from now on, until `close`."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="mesh-certificate")

    async def close(self) -> None:
        """Idempotent."""
        task, self._task = self._task, None
        await cancel(task)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.refresh()

    def _read(self) -> Pem:
        config = self.config
        try:
            return Pem(*(Path(name).read_bytes() for name in (config.cert, config.key, config.ca)))
        except OSError as error:
            raise _unusable(config, error) from None

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        pem = self.pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)

    def _fresh_configuration(self) -> grpc.ServerCertificateConfiguration:
        # Called by a thread of grpc's, for each connection.
        self.refresh()
        return self._server_configuration()


def _context(config: MeshTlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, config)
    return context


def _load(context: ssl.SSLContext, config: MeshTlsConfig) -> None:
    try:
        # Without a passphrase a locked key would ask for one on the terminal.
        context.load_cert_chain(config.cert, config.key, password=lambda: "")
        context.load_verify_locations(config.ca)
    except (OSError, ssl.SSLError) as error:
        raise _unusable(config, error) from None


def _unusable(config: MeshTlsConfig, error: OSError) -> KvmeshError:
    why = (error.strerror or str(error)).lower()
    files = f"certificate {config.cert}, key {config.key}, authorities {config.ca}"
    return invalid(f"cannot use the mesh's TLS files ({files}): {why}; see `tls` in the configuration")
