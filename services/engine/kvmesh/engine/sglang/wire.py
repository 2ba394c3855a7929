"""SGLang's own wire, spoken from the layouts its launcher reports: msgpack arrays `[class name, field, ...]`.

Only what is needed is decoded. A field that a release of SGLang has dropped is noticed at start.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from typing import Any, Union

import msgspec
from msgspec import Raw
from msgspec.msgpack import Ext

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.sglang.logprobs import LOGPROB_FIELDS, StepLogprobs
from kvmesh.v1.errors_pb2 import ErrorCode

# The fields we read of each message; Raw ones are decoded only when something new is in them.
_READ: dict[str, dict[str, Any]] = {
    "BatchTokenIDOutput": {
        "rids": list[str],
        "finished_reasons": list[dict[str, Any] | None],
        "output_ids": list[Ext],
        "cached_tokens": list[int],
        **dict.fromkeys(LOGPROB_FIELDS, Raw),
        "cached_tokens_details": Raw,
        "time_stats": Raw,
    },
    "BatchEmbeddingOutput": {
        "rids": list[str],
        "finished_reasons": list[dict[str, Any] | None],
        "embeddings": list[list[float]],
        "cached_tokens": list[int],
        "time_stats": Raw,
    },
    "AbortReq": {"rid": str, "finished_reason": dict[str, Any] | None},
    "FlushCacheReqOutput": {"success": bool, "message": str},
}
_decode_details = msgspec.msgpack.Decoder(list[dict[str, Any] | None] | None).decode
_Times = tuple[float, float, float, int, float]
_decode_times = msgspec.msgpack.Decoder(list[_Times | None]).decode
_decode_wrapper = msgspec.msgpack.Decoder(tuple[str, bytes] | None).decode


class _Template:
    """A message of SGLang's with every field at its default, to be copied and filled in."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.message: list[Any] = msgspec.msgpack.decode(base64.b64decode(described["message"]))
        # The class name comes first.
        self.places = {name: place for place, name in enumerate(described["fields"], start=1)}

    def fill(self, fields: dict[str, Any]) -> list[Any]:
        message = self.message.copy()
        for name, value in fields.items():
            message[self.places[name]] = value
        return message


class Wire:
    """Encodes what SGLang's scheduler reads and decodes what it writes."""

    def __init__(self, layout: dict[str, Any]) -> None:
        """Raises KvmeshError(ENGINE_FAILED) where SGLang's messages lack a field that is needed."""
        try:
            self._request = _Template(layout["request"])
            self._embedding = _Template(layout["embedding"])
            self._abort = _Template(layout["abort"])
            self._flush = _Template(layout["flush"])
            self._sampling: list[Any] = self._request.message[self._request.places["sampling_params"]]
            self._sampling_places = {name: i for i, name in enumerate(layout["sampling_fields"])}
            ids: Ext = self._request.message[self._request.places["input_ids"]]
            fields = {
                "BatchTokenIDOutput": layout["outputs"],
                "BatchEmbeddingOutput": layout["embeddings"],
                "AbortReq": layout["abort"]["fields"],
                "FlushCacheReqOutput": layout["flushed"],
            }
            kinds = tuple(_reader(name, fields[name]) for name in _READ)
        except KeyError as error:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_ENGINE_FAILED,
                f"this sglang has no message field {error}; install the release kvmesh-engine pins",
            ) from None
        # What precedes the ids in an encoded array: its type.
        self._ids_code, self._ids_type = ids.code, bytes(ids.data)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Union[kinds]).decode  # noqa: UP007

    def request(self, rid: str, token_ids: array[int], sampling: dict[str, Any], **fields: Any) -> bytes:
        """A TokenizedGenerateReqInput. `sampling` and `fields` are by SGLang's names."""
        params = self._sampling.copy()
        for name, value in sampling.items():
            params[self._sampling_places[name]] = value
        message = {"rid": rid, "input_ids": self._ids(token_ids), "sampling_params": params, **fields}
        return self._encode(self._request.fill(message))

    def embedding(self, rid: str, token_ids: array[int], **fields: Any) -> bytes:
        """A TokenizedEmbeddingReqInput; `fields` are by SGLang's names."""
        return self._encode(self._embedding.fill({"rid": rid, "input_ids": self._ids(token_ids), **fields}))

    def _ids(self, token_ids: array[int]) -> Ext:
        return Ext(self._ids_code, self._ids_type + token_ids.tobytes())

    def abort(self, rid: str) -> bytes:
        """An AbortReq. SGLang takes it for every request whose id starts with `rid`."""
        return self._encode(self._abort.fill({"rid": rid}))

    def flush(self) -> bytes:
        """A FlushCacheReqInput."""
        return self._encode(self._flush.message)

    def decode(self, message: bytes | memoryview) -> Any:
        """One of the messages in `_READ`, or None for any other kind."""
        try:
            return self._decode(message)
        except msgspec.ValidationError:
            if _kind(message) in _READ:
                raise
            return None

    def token_ids(self, packed: Ext) -> list[int]:
        ids = array("q")
        ids.frombytes(memoryview(packed.data)[len(self._ids_type) :])
        return ids.tolist()

    def cached_details(self, output: Any, place: int) -> dict[str, Any] | None:
        """SGLang's cached tokens by tier for one request of an output message."""
        details = _decode_details(output.cached_tokens_details)
        return details[place] if details else None

    def logprobs(self, output: Any) -> StepLogprobs | None:
        """The log probabilities of an output message; None where nobody asked for any."""
        return StepLogprobs.of(output)

    def times(self, output: Any) -> Sequence[_Times | None]:
        """For each request (queue ms, prefill ms, transfer ms, bytes, load ms); None where nothing is new."""
        wrapped = _decode_wrapper(output.time_stats)
        return _decode_times(wrapped[1]) if wrapped else [None] * len(output.rids)


def _reader(name: str, fields: Sequence[str]) -> type[msgspec.Struct]:
    """A struct that takes what is needed of a message and skips the rest unparsed."""
    needed = _READ[name]
    if missing := needed.keys() - set(fields):
        raise KeyError(f"{name}.{min(missing)}")
    last = max(fields.index(field) for field in needed)
    # Trailing fields of an array that a struct does not know are skipped by msgspec.
    columns = [(field, needed.get(field, Raw)) for field in fields[: last + 1]]
    return msgspec.defstruct(name, columns, array_like=True, tag=name, gc=False)


def _kind(message: bytes | memoryview) -> str:
    """The class name at the head of a message."""
    head = msgspec.msgpack.decode(message)
    return head[0] if isinstance(head, list) and head else ""
