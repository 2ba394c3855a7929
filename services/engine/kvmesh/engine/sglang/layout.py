"""SGLang's message layouts, read from its own classes, so that the worker can speak its wire
without importing it and notices when a release has changed it.

SGLang's messages are msgpack arrays `[class name, field, ...]`.
"""

from __future__ import annotations

import base64
from array import array
from typing import Any

from sglang.srt.managers import io_struct
from sglang.srt.sampling.sampling_params import SamplingParams


def wire_layout() -> dict[str, Any]:
    """Field names of each message in order, and for those we send, a message with defaults to fill in."""
    sampling = SamplingParams(max_new_tokens=1)
    sampling.normalize(None)
    request = io_struct.TokenizedGenerateReqInput(
        rid="",
        input_text=None,
        input_ids=array("q"),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=True,
    )
    embedding = io_struct.TokenizedEmbeddingReqInput(
        rid="",
        input_text=None,
        input_ids=array("q"),
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
    )
    return {
        "request": _template(request),
        "embedding": _template(embedding),
        "sampling_fields": list(SamplingParams.__struct_fields__),
        "abort": _template(io_struct.AbortReq(rid="")),
        "flush": _template(io_struct.FlushCacheReqInput()),
        "outputs": list(io_struct.BatchTokenIDOutput.__struct_fields__),
        "embeddings": list(io_struct.BatchEmbeddingOutput.__struct_fields__),
        "flushed": list(io_struct.FlushCacheReqOutput.__struct_fields__),
    }


def _template(message: Any) -> dict[str, Any]:
    encoded = io_struct.msgpack_encode(message)
    return {
        "fields": list(type(message).__struct_fields__),
        "message": base64.b64encode(encoded).decode("ascii"),
    }
