"""Why a request ended, from SGLang's words to the contract's."""

from __future__ import annotations

import re
from typing import Any

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.engine.contract import Finish, FinishReason
from kvmesh.v1.errors_pb2 import ErrorCode

# What SGLang says when one half of a split request loses the other.
_HALF_LOST = ("handshake failed", "bootstrap failed", "transfer failed")
# What it says when a block from another tier did not arrive as it left; computed anew, it will.
_LOAD_FAILED = "External KV cache load failed"
# What it says of a constraint that it cannot compile, or not in time, or that nothing fulfils.
_CONSTRAINT_FAILED = ("Failed to compile ", "Grammar preprocessing timed out", "rammar accept_token failed")
# Where in which compiler's source a problem was found.
_SOURCE = re.compile(r"^(Failed|Grammar)[^:]*: ?((Grammar|Invalid)[^:]*: ?)?(\[[\d:]+\] \S+:\d+: )?")
_ABORTED_BY_DECODE = "Aborted by decode-side abort notification"

_CODES = {
    400: ErrorCode.ERROR_CODE_INVALID_ARGUMENT,
    408: ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED,
    503: ErrorCode.ERROR_CODE_OVERLOADED,
}
CANCELLED = Finish(FinishReason.CANCELLED)


def finish_of(reason: dict[str, Any] | None, aborting: bool) -> Finish | None:
    """SGLang's finish reason; None for a request that goes on. `aborting`: we asked for its end."""
    if reason is None:
        return None
    kind = reason["type"]
    if kind == "length":
        return Finish(FinishReason.LENGTH)
    if kind == "stop":
        matched = reason.get("matched")
        return Finish(FinishReason.STOP, matched_token_id=matched if isinstance(matched, int) else None)
    return aborted(reason, aborting)


def aborted(reason: dict[str, Any] | None, aborting: bool) -> Finish:
    """A request SGLang ended: on our request, on the other half's, or of its own accord."""
    message = (reason or {}).get("message") or "aborted by the engine"
    if aborting or _ABORTED_BY_DECODE in message:
        return CANCELLED
    if _LOAD_FAILED in message:
        code = ErrorCode.ERROR_CODE_DATA_CORRUPTED
    elif any(words in message for words in _HALF_LOST):
        code = ErrorCode.ERROR_CODE_UNAVAILABLE
    elif any(words in message for words in _CONSTRAINT_FAILED):
        return failed(invalid(f"the constraint cannot be kept: {_problem(message)}", "constraint"))
    else:
        status = (reason or {}).get("status_code") or 0
        code = _CODES.get(status, ErrorCode.ERROR_CODE_ENGINE_FAILED)
    text = message[:1].lower() + message[1:].rstrip(". ")
    return failed(KvmeshError(code, text))


def failed(error: KvmeshError) -> Finish:
    return Finish(FinishReason.ERROR, error=error)


def _problem(message: str) -> str:
    """What compilers say, without the grammar that they may quote."""
    first = message.strip().splitlines()[0]
    if "accept_token" in first:
        return "it allows no answer"
    if "timed out" in first:
        return "it takes too long to compile"
    return _SOURCE.sub("", first, count=1)[:300].strip().rstrip(".:") or "it is malformed"
