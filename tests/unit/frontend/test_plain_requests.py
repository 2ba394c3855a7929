"""Bodies read as plain ones: never another request than validation makes of the same bytes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.common.errors import KvmeshError
from kvmesh.core import read_plain_request
from kvmesh.frontend.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, parse
from kvmesh.frontend.protocol.plain import PlainBody, request_of

Kind = type[ChatCompletionRequest] | type[CompletionRequest]

PATHS: dict[Kind, str] = {
    CompletionRequest: "/v1/completions",
    ChatCompletionRequest: "/v1/chat/completions",
}
HELLO = {"role": "user", "content": "hello"}
PLAIN: list[tuple[Kind, dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0, "ignore_eos": True}),
    (CompletionRequest, {"prompt": "a", "stop": "x", "stream": True, "n": 1, "user": "u"}),
    (CompletionRequest, {"prompt": "é🗼", "stop": ["x", "y"], "top_p": 0, "top_k": 0, "seed": -1}),
    (CompletionRequest, {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}),
    (
        CompletionRequest,
        {"prompt": "a", "presence_penalty": 1, "frequency_penalty": -0.5, "max_tokens": None},
    ),
    (ChatCompletionRequest, {"messages": [HELLO], "max_completion_tokens": 4, "max_tokens": 5}),
    (ChatCompletionRequest, {"messages": [{"role": "developer", "content": ""}, HELLO], "stream": False}),
    (ChatCompletionRequest, {"messages": [HELLO, {"role": "assistant", "content": "x"}, HELLO]}),
]


def written(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nX-A: B\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read(kind: Kind, body: bytes) -> PlainBody | None:
    found = read_plain_request(written(PATHS[kind], body), 10_000, 1_000_000)
    if found is None:
        return None
    assert not isinstance(found, int), "all of it was there"
    path, headers, fields, tokens = found
    assert path == PATHS[kind]
    assert headers == [(b"host", b"h"), (b"x-a", b"B"), (b"content-length", b"%d" % len(body))]
    return PlainBody(fields, tokens)


def meaning(request: GenerationRequest) -> list[Any]:
    """All that is asked of a body behind its validation."""
    said: list[Any] = [
        request.model,
        request.sampling().SerializeToString(deterministic=True),
        request.stops(),
        (request.wanted(), request.drawn(), request.shows_scores()),
        (bool(request.stream), request.include_usage()),
        (request.session_id(), request.priority(), request.tier(), request.return_hint()),
        (request.constraint(), request.kvmesh),
    ]
    if isinstance(request, CompletionRequest):
        said += [
            [p if isinstance(p, str) else list(p) for p in request.prompts()],
            (bool(request.echo), request.max_tokens),
        ]
    if isinstance(request, ChatCompletionRequest):
        said += [
            request.conversation(),
            request.template_args(),
            (
                request.functions(),
                request.wants_strict_calls(),
                request.forced_function(),
                request.must_call(),
            ),
            (request.store, request.metadata, request.call_is_function(), request.parallel_tool_calls),
        ]
    return said


def agree(kind: Kind, body: bytes) -> bool:
    """Whether the body is plain; then both ways mean the same, or `check` refuses both alike."""
    plain = read(kind, body)
    if plain is None:
        return False
    # It would not be refused, and nothing of it is ignored.
    whole, ignored = parse(kind, body)
    assert not ignored
    quick = request_of(kind, plain)
    refusals = []
    for request in (whole, quick):
        try:
            request.check()
            refusals.append(None)
        except KvmeshError as error:
            refusals.append(error.message)
    assert refusals[0] == refusals[1]
    assert meaning(whole) == meaning(quick)
    return True


@pytest.mark.parametrize(("kind", "fields"), PLAIN)
def test_plain_bodies_mean_what_they_say(kind: Kind, fields: dict[str, Any]) -> None:
    assert agree(kind, orjson.dumps({"model": "m", **fields}))


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**65), 2**65),
    st.floats(-3, 3),
    st.sampled_from([0.0, -0.0, 1.0, 2.0, 2**31 - 1, 2**31, 2**63, -(2**63)]),
)
TEXTS = st.text(max_size=8)
ANYTHING = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.lists(TEXTS, max_size=3))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "other"]),
            "content": TEXTS,
        },
        optional={"name": TEXTS},
    ),
    max_size=3,
)
PROMPTS = st.one_of(TEXTS, st.lists(st.integers(-1, 2**32), max_size=5), st.lists(TEXTS, max_size=2))
FIELDS = {
    **dict.fromkeys(("temperature", "top_p", "frequency_penalty", "presence_penalty"), NUMBERS),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "top_k", "seed", "n"), NUMBERS),
    **dict.fromkeys(("stream", "ignore_eos"), st.one_of(st.none(), st.booleans())),
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=17)),
    "stream_options": st.one_of(st.none(), st.fixed_dictionaries({}, optional={"include_usage": ANYTHING})),
    "user": ANYTHING,
}


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from([CompletionRequest, ChatCompletionRequest]),
    prompt=PROMPTS,
    messages=MESSAGES,
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    odd=st.one_of(st.none(), st.sampled_from(sorted(FIELDS))),
    value=ANYTHING,
)
def test_no_body_is_read_in_two_ways(
    kind: Kind, prompt: Any, messages: Any, fields: dict[str, Any], odd: str | None, value: Any
) -> None:
    asked = {"prompt": prompt} if kind is CompletionRequest else {"messages": messages}
    body = {"model": "m", **asked, **fields, **({odd: value} if odd else {})}
    written = {k: v for k, v in body.items() if not (isinstance(v, int) and abs(v) >= 2**63)}
    agree(kind, orjson.dumps(written))


def test_seeds_and_numbers_at_their_ends() -> None:
    for number in ("9223372036854775807", "-9223372036854775808", "1e0", "2.0", "-0", "-0.0", "1E-400"):
        for name in ("temperature", "seed", "top_k", "max_tokens"):
            body = f'{{"model":"m","prompt":"p","{name}":{number}}}'.encode()
            agree(CompletionRequest, body)


def test_what_is_large_goes_the_long_way() -> None:
    body = orjson.dumps({"model": "m", "prompt": "p" * 100})
    request = written("/v1/completions", body)
    assert read_plain_request(request, 1_000, len(body)) is not None
    assert read_plain_request(request, 1_000, len(body) - 1) is None
    assert read_plain_request(request, 10, len(body)) is None
