"""Request bodies, never more of one than the configuration allows."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol.plain import PlainBody
from kvmesh.v1.errors_pb2 import ErrorCode


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises KvmeshError: PAYLOAD_TOO_LARGE once it is known to exceed `limit` bytes,
    REQUEST_TIMEOUT when it is not whole in time (`frontend.body_timeout_s`), UNSUPPORTED_MEDIA_TYPE if it is
    packed, or said to be anything but JSON."""
    headers = dict(request.scope["headers"])
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.lower() not in ("identity", ""):
        # Unpacked, a small body may be larger than any limit.
        raise _unreadable("content-encoding", encoding, "send the body as it is")
    # Pages of other origins may send all other types without asking for permission.
    said = headers.get(b"content-type", b"").decode("latin-1")
    kind = said.partition(";")[0].strip().lower()
    if kind not in ("application/json", "") and not kind.endswith("+json"):
        raise _unreadable("content-type", said, "send application/json")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    if request.state.connection.has_body():
        return await _read(request, limit)
    seconds = request.app.state.gateway.config.body_timeout_s
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, limit)
    except TimeoutError:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_REQUEST_TIMEOUT,
            f"the request's body was not complete within {seconds:g} s; send it again",
        ) from None


def plain_body(request: Request) -> PlainBody | None:
    """The body, where it was read as a plain one with its request; then there is nothing else to read, and
    from now on it is the caller's alone."""
    return request.scope["state"].pop("plain", None)


async def _read(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise KvmeshError(ErrorCode.ERROR_CODE_CANCELLED, "the client left while sending")
        size += len(message["body"])
        if size > limit:
            raise _too_large(limit)
        parts.append(message["body"])
        more = message["more_body"]
    return b"".join(parts)


def _unreadable(header: str, value: str, instead: str) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_UNSUPPORTED_MEDIA_TYPE,
        f"{header} {value[:64]!r} is not supported; {instead}",
        param=header,
    )


def _too_large(limit: int) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_PAYLOAD_TOO_LARGE, f"the request body exceeds {limit} bytes; send less"
    )
