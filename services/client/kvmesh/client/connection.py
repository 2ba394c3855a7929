"""How a client reaches a frontend: its address, its key, its certificates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM contents, not files; `cert` and `key` where the frontend asks for a certificate."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    server_name: str = ""
    """name the frontend's certificate carries; empty: the address's host"""

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def options(self) -> list[tuple[str, Any]]:
        name = self.server_name
        return [*OPTIONS, *([("grpc.ssl_target_name_override", name)] if name else [])]


def metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    """What goes with every call."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
