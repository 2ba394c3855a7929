"""The endpoint's certificate, which may be replaced while it serves."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import structlog

from kvmesh.common.config import TlsConfig
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.tasks import cancel

log = structlog.get_logger()

_LOOK_S = 1.0


class Certificate:
    """`context` is for the server's listeners; new connections get what the files held last.

    A replacement that cannot be used is logged and the last good one kept. Belongs to one event loop.
    """

    def __init__(self, config: TlsConfig) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) where the files cannot be used."""
        self._config = config
        self._files = [Path(name) for name in (config.cert, config.key, config.client_ca) if name]
        self._task: asyncio.Task[None] | None = None
        self.context = self._load(None)
        self._stamp = self._look()

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="certificate")

    async def close(self) -> None:
        await cancel(self._task)

    def _load(self, context: ssl.SSLContext | None) -> ssl.SSLContext:
        """A context with what the files hold now; into `context` itself where one is given."""
        context = context or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        config = self._config
        try:
            # Without a passphrase a locked key would ask for one on the terminal.
            context.load_cert_chain(config.cert, config.key, password=lambda: "")
            if config.client_ca:
                context.load_verify_locations(config.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            why = (error.strerror or str(error)).lower()
            raise invalid(
                f"cannot use the certificate {config.cert} with the key {config.key}: {why}; "
                "see `frontend.tls` in the configuration"
            ) from None
        return context

    def _look(self) -> list[tuple[int, int, int]]:
        """What changes when a file is replaced or written; a missing file is as good as another."""
        found = []
        for file in self._files:
            try:
                stat = file.stat()
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            stamp = self._look()
            if stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                # Certificate and key are two files: both must fit before either is taken.
                self._load(None)
                self._load(self.context)
                log.info("certificate loaded anew", cert=self._config.cert)
            except KvmeshError as error:
                log.error("certificate not replaced", error=error.message)
