"""The endpoint's certificate, which may be replaced while it serves."""

from __future__ import annotations

import asyncio
import ssl

import structlog

from kvmesh.common.config import TlsConfig
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.tasks import cancel
from kvmesh.common.tls import LOOK_S, WatchedFiles

log = structlog.get_logger()


class Certificate:
    """`context` is for the server's listeners; new connections get what the files held last.

    A replacement that cannot be used is logged and the last good one kept. Belongs to one event loop.
    """

    def __init__(self, config: TlsConfig) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) where the files cannot be used."""
        self._config = config
        self._files = WatchedFiles((config.cert, config.key, config.client_ca))
        self._task: asyncio.Task[None] | None = None
        self.context = self._load(None)

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

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._files.changed():
                continue
            try:
                # Certificate and key are two files: both must fit before either is taken.
                self._load(None)
                self._load(self.context)
                log.info("certificate loaded anew", cert=self._config.cert)
            except KvmeshError as error:
                log.error("certificate not replaced", error=error.message)
