"""The response object: what was asked, how far it is, and what it has said."""

from __future__ import annotations

import time
from typing import Any

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.responses.items import new_id
from kvmesh.frontend.responses.request import Format, Reasoning, ResponsesRequest, TextConfig
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.explain import usage, usage_json
from kvmesh.v1.errors_pb2 import ErrorCode

LIVE = ("queued", "in_progress")


def new_response(body: ResponsesRequest, model: str, tier: str) -> dict[str, Any]:
    """As long as nothing has come."""
    text, reasoning = body.text or TextConfig(), body.reasoning or Reasoning()
    wanted = text.format or Format(type="text")
    choice = body.tool_choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        # This API has no field for the penalties, and Open Responses wants to see them.
        "frequency_penalty": 0.0,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "presence_penalty": 0.0,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": tier,
        "store": body.stored(),
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": wanted.model_dump(by_alias=True, exclude_none=True),
            "verbosity": text.verbosity or "medium",
        },
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_unset=True),
        "tools": [
            {"description": None, "parameters": None, "strict": None, **tool.model_dump(exclude_unset=True)}
            for tool in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def response_usage(answers: Answers) -> dict[str, Any]:
    chat = usage_json(usage(answers))
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": chat["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": chat["completion_tokens_details"]["reasoning_tokens"],
        },
        "total_tokens": chat["total_tokens"],
    }


def response_error(error: KvmeshError) -> dict[str, Any]:
    """OpenAI knows few codes here; the message says what it was."""
    client = {
        ErrorCode.ERROR_CODE_RATE_LIMITED: "rate_limit_exceeded",
        ErrorCode.ERROR_CODE_INVALID_ARGUMENT: "invalid_prompt",
        ErrorCode.ERROR_CODE_UNSUPPORTED: "invalid_prompt",
    }
    return {"code": client.get(error.code, "server_error"), "message": error.message}
