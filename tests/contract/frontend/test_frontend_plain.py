"""Plain requests: the same answers as any other way into the server gives, and the same care."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import orjson
import pytest

from fixtures.frontend import ANSWER, MODEL, Frontend, Split, frontend, hello
from fixtures.waiting import eventually
from kvmesh.frontend.http import plain
from kvmesh.frontend.http.plain import PlainCycle, PlainProtocol
from kvmesh.frontend.protocol.plain import PlainBody

PROMPT = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
TOKENS = {"model": MODEL, "prompt": [260, 261, 262], "max_tokens": 4}


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._parser = h11.Connection(h11.CLIENT)

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)

    async def answer(self) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of the next one."""
        if self._parser.our_state is h11.DONE:
            self._parser.start_next_cycle()
        # What was really sent is not the parser's.
        self._parser.send(
            h11.Request(method="POST", target="/", headers=[("host", "h"), ("content-length", "0")])
        )
        self._parser.send(h11.EndOfMessage())
        head: h11.Response | None = None
        body = b""
        async with asyncio.timeout(30):
            while True:
                event = self._parser.next_event()
                if event is h11.NEED_DATA:
                    self._parser.receive_data(await self.reader.read(65_536))
                elif isinstance(event, h11.Response):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage)
                    break
        assert head is not None
        return head.status_code, {k.decode(): v.decode() for k, v in head.headers}, body.decode()


@asynccontextmanager
async def connected(front: Frontend) -> AsyncIterator[Client]:
    host, port = front.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def written(path: str, fields: dict[str, Any], headers: str = "") -> tuple[bytes, bytes]:
    """Head and body."""
    body = orjson.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode(), body


def chat(**fields: Any) -> tuple[bytes, bytes]:
    return written("/v1/chat/completions", hello(**fields))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the requests that were plain."""
    paths: list[str] = []
    original = PlainProtocol.start_plain

    def watched(self: PlainProtocol, path: str, headers: Any, body: PlainBody) -> None:
        paths.append(path)
        original(self, path, headers, body)

    monkeypatch.setattr(PlainProtocol, "start_plain", watched)
    return paths


def alike(answer: tuple[int, dict[str, str], str]) -> tuple[int, dict[str, str], str]:
    """Without what differs from answer to answer."""
    status, headers, body = answer
    headers = {k: v for k, v in headers.items() if k not in ("date", "x-request-id", "openai-processing-ms")}
    body = re.sub(r'"(id|created)":("[^"]*"|\d+)', r'"\1":0', body)
    return (
        status,
        headers,
        re.sub(r'"(finish_time|ttft|total|queue|route|prefill|transfer)":[\d.]+', "", body),
    )


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", PROMPT),
        ("/v1/completions", TOKENS),
        ("/v1/completions", {**PROMPT, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", hello()),
        ("/v1/chat/completions", hello(stream=True, stop=[" Paris"], seed=3, temperature=1)),
        ("/v1/chat/completions", hello(model="nobody's")),
        ("/v1/completions", {**TOKENS, "prompt": [10**6]}),
        ("/v1/completions", {**TOKENS, "prompt": [260] * 5_000}),
        ("/v1/completions", {**PROMPT, "min_tokens": 5}),
        ("/v1/completions", {**PROMPT, "unknown": 1}),
    ],
)
async def test_the_answer_is_the_one_of_any_other_way(
    split: Split, taken: list[str], path: str, fields: dict[str, Any]
) -> None:
    head, body = written(path, fields)
    rare = written(path, fields, "Expect: nothing\r\n")
    is_plain = not set(fields) & {"min_tokens", "unknown"}
    async with connected(split.front) as client:
        client.send(head + body)
        whole = await client.answer()
        assert taken == [path] * is_plain
        client.send(head)
        await asyncio.sleep(0.01)
        client.send(body)
        apart = await client.answer()
        assert taken == [path] * is_plain * 2
        taken.clear()
        client.send(*rare)
        parsed = await client.answer()
        assert not taken
    assert whole[1].keys() == parsed[1].keys()
    assert alike(whole) == alike(apart) == alike(parsed)
    await split.idle()


async def test_a_body_that_is_late_is_the_parsers(split: Split, taken: list[str]) -> None:
    head, body = chat()
    async with connected(split.front) as client:
        for cut in (0, 5, len(body) - 1):
            client.send(head + body[:cut])
            await asyncio.sleep(0.2)
            client.send(body[cut:])
            status, _, text = await client.answer()
            assert (status, orjson.loads(text)["choices"][0]["message"]["content"]) == (200, ANSWER)
    assert not taken


async def test_a_body_that_never_comes_is_not_waited_for() -> None:
    async with frontend(body_timeout_s=0.2) as front, connected(front) as client:
        client.send(chat()[0])
        status, _, text = await client.answer()
        assert (status, orjson.loads(text)["error"]["code"]) == (408, "request_timeout")


async def test_requests_behind_one_another(split: Split, taken: list[str]) -> None:
    """Sent at once, during the answer before, and in pieces: each is answered, in order."""
    one, two = b"".join(chat(max_tokens=1)), b"".join(chat(stream=True))
    async with connected(split.front) as client:
        client.send(one + two)
        assert orjson.loads((await client.answer())[2])["usage"]["completion_tokens"] == 1
        assert (await client.answer())[2].endswith("data: [DONE]\n\n")
        assert not taken
        split.decode.step_s = 0.02
        client.send(two)
        await eventually(lambda: bool(split.front.mesh.sessions), 5)
        assert taken
        client.send(one[:30])
        await asyncio.sleep(0.05)
        client.send(one[30:])
        assert (await client.answer())[2].endswith("data: [DONE]\n\n")
        assert orjson.loads((await client.answer())[2])["usage"]["completion_tokens"] == 1
        client.send(one)
        assert (await client.answer())[0] == 200
    await split.idle()


async def test_a_client_that_leaves_stops_its_request(split: Split, taken: list[str]) -> None:
    split.decode.step_s = 0.05
    for head, body in (chat(stream=True), chat()):
        async with connected(split.front) as client:
            client.send(head + body)
            await eventually(lambda: bool(split.decode.live), 5)
        await split.idle()
    async with connected(split.front) as client:
        client.send(chat()[0])
    assert len(taken) == 2
    await split.idle()


async def test_what_a_stream_says_at_once_leaves_at_once(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head, pieces and end of an answer that is there are one write; what comes later is not held back."""
    writes: list[bytes] = []
    original = PlainCycle._flush

    def watched(self: PlainCycle) -> None:
        if self._unsent:
            writes.append(b"".join(self._unsent))
        original(self)

    monkeypatch.setattr(PlainCycle, "_flush", watched)
    async with connected(split.front) as client:
        client.send(*chat(stream=True, max_tokens=1))
        await client.answer()
        assert len(writes) <= 2
        writes.clear()
        split.decode.step_s = 0.03
        client.send(b"".join(chat(stream=True)))
        await client.answer()
    assert len(writes) > 3


async def test_the_last_answers_are_given_before_the_server_ends(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that streams, and the one whose body is still to come."""
    monkeypatch.setattr(plain, "_HOLD_S", 30.0)
    split.decode.step_s = 0.1
    async with connected(split.front) as client, connected(split.front) as late:
        client.send(b"".join(chat(stream=True)))
        await eventually(lambda: bool(split.decode.live), 5)
        head, body = chat(max_tokens=1)
        late.send(head + body[:4])
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(split.front.http_server.stop(10))
        await asyncio.sleep(0.3)
        late.send(body[4:])
        assert (await client.answer())[2].endswith("data: [DONE]\n\n")
        status, headers, _ = await late.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert not await client.reader.read()
        await stopping
