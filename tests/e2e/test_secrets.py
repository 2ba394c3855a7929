"""Nothing that a mesh writes, but its store of answers, has a key, a prompt or an answer in it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from fixtures.certificates import NAME, Authority
from fixtures.mesh import Mesh, running, wait_for
from kvmesh.v1.frontend_pb2 import ChatMessage, ChatRequest
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceStub

pytestmark = pytest.mark.timeout(240)

# Words that nothing else says, with a long tail: prompts of several blocks.
WORDS = ("mellonxyzzy", "plughfriend", "xyzzyspeak")
PROMPT = " ".join(WORDS) + " and so on" * 40
WRONG_KEY = "kvm-wrongandverysecret"


@dataclass
class Secured:
    mesh: Mesh
    authority: Authority

    def client(self, key: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        verify = ssl.create_default_context(cafile=str(self.authority.ca))
        port = self.mesh.config["frontend"]["http_port"]
        return httpx.Client(base_url=f"https://127.0.0.1:{port}", headers=headers, verify=verify, timeout=60)

    def opens(self, key: str) -> bool:
        with self.client(key) as http:
            return http.get("/v1/models").status_code == 200

    def written(self) -> dict[Path, bytes]:
        """Every file of the mesh, what its own bus stores included."""
        return {path: path.read_bytes() for path in self.mesh.home.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["text", "json"])
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.issue()
    files = authority.config()
    config = {
        # A token every 10 ms: some streams are broken off half-way.
        "engine": {"kind": "mock", "mock": {"decode_base_ms": 10.0}},
        "tls": authority.config(server_name=NAME),
        "frontend": {"tls": {"cert": files["cert"], "key": files["key"]}},
        "tenants": {"keys": "required"},
        "telemetry": {"log_level": "debug", "log_format": request.param},
    }
    for mesh in running(tmp_path_factory.mktemp(f"secrets-{request.param}"), config):
        yield Secured(mesh, authority)


def bodies() -> list[tuple[str, Any]]:
    """Paths and what is sent there: well formed, and wrong in a place that has the prompt."""
    turns = [{"role": "user", "content": PROMPT}]
    chat = {"model": "default", "messages": turns, "max_tokens": 4}
    return [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "store": True, "user": WORDS[0], "metadata": {"a": WORDS[1]}}),
        ("/v1/chat/completions", {**chat, "stop": [WORDS[0]], "logit_bias": {WORDS[1]: 1}}),
        ("/v1/chat/completions", {**chat, "temperature": PROMPT}),
        ("/v1/chat/completions", {**chat, "messages": [{"role": WORDS[0], "content": PROMPT}]}),
        ("/v1/chat/completions", {**chat, "model": WORDS[0]}),
        ("/v1/chat/completions", {**chat, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {**chat, WORDS[0]: PROMPT}),
        ("/v1/completions", {"model": "default", "prompt": PROMPT, "max_tokens": 4, "echo": True}),
        ("/v1/completions", {"model": "default", "prompt": PROMPT * 100}),
        ("/v1/responses", {"model": "default", "input": PROMPT, "max_output_tokens": 4}),
        ("/v1/responses", {"model": "default", "input": PROMPT, "background": True, "max_output_tokens": 4}),
        ("/v1/responses", {"model": "default", "input": PROMPT, "previous_response_id": WORDS[0]}),
        ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": turns}),
        ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": turns, "system": [PROMPT]}),
        ("/v1/embeddings", {"model": "default", "input": PROMPT}),
        ("/v1/tokenize", {"model": "default", "prompt": PROMPT}),
        (f"/v1/{WORDS[0]}", {}),
    ]


def test_no_key_prompt_or_answer_is_written(secured: Secured) -> None:
    mesh = secured.mesh
    key = mesh.command("keys", "create", "--tenant", "acme", "--rpm", "1000").stdout.strip()
    limited = mesh.command("keys", "create", "--tenant", "rival", "--rpm", "1").stdout.strip()
    rotated = mesh.command("keys", "create", "--tenant", "other").stdout.strip()
    fresh = mesh.command("keys", "rotate", rotated).stdout.strip().splitlines()[-1]
    for known in (key, limited, fresh):
        wait_for(lambda known=known: secured.opens(known), 10, "the key to be known")
    statuses: set[int] = set()
    for used in (key, WRONG_KEY, limited, ""):
        with secured.client(used) as http:
            for path, body in bodies():
                statuses.add(http.post(path, json=body).status_code)
            for content in (f'{{"messages": "{PROMPT}', f'{{"prompt": "{PROMPT}\xff"}}'.encode("latin-1")):
                statuses.add(http.post("/v1/completions", content=content).status_code)
            statuses.add(
                http.post("/v1/messages", json={}, headers={"x-api-key": used or WRONG_KEY}).status_code
            )
            statuses.add(
                http.get(f"/v1/models?key={WRONG_KEY}", headers={"x-long": "a" * 70_000}).status_code
            )
    assert {200, 400, 401, 404, 429, 431} <= statuses
    assert not {status for status in statuses if status >= 500}
    said = _broken_off(secured, key)
    asyncio.run(_over_grpc(secured, key))
    mesh.command("keys", "revoke", fresh)
    with secured.client(key) as http:
        ids = http.post("/v1/tokenize", json={"model": "default", "prompt": PROMPT}).json()["tokens"]

    written = secured.written()
    logs = {path: text for path, text in written.items() if path.parent.name == "logs"}
    assert sum(map(len, logs.values())) > 10_000
    # What was worked on was seen to.
    assert any(b"client left" in text for text in logs.values())
    private = secured.authority.read()[1]
    secrets = [
        key,
        limited,
        rotated,
        fresh,
        WRONG_KEY,
        # Behind the mark and the key's id.
        *(k.split("-", 2)[2] for k in (key, limited, fresh)),
    ]
    secrets += [line for line in private.decode().splitlines() if not line.startswith("---")]
    for path, text in written.items():
        for secret in secrets:
            assert secret.encode() not in text, f"a key or a part of it in {path}"
    spoken = [*WORDS, said, *(glue.join(map(str, ids[:4])) for glue in (", ", ",", " "))]
    for path, text in written.items():
        if path.name.startswith("answers.db"):
            continue
        for words in spoken:
            assert words.encode() not in text, f"{words!r} in {path}"
    # The one place for them, its owner's alone.
    assert WORDS[0].encode() in b"".join(text for path, text in written.items() if "answers.db" in path.name)


def _broken_off(secured: Secured, key: str) -> str:
    """Streams whose clients leave and whose workers die; what the first one was told."""
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 400, "stream": True}
    with secured.client(key) as http:
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            said = "".join(next(lines) for _ in range(12))
        killer = threading.Timer(0.5, lambda: [secured.mesh.kill(name) for name in ("decode-0", "prefill-0")])
        killer.start()
        with http.stream("POST", "/v1/completions", json=body) as stream:
            stream.read()
        killer.join()
    text = said.split('"text":"')[3].split('"')[0]
    assert text
    return text


async def _over_grpc(secured: Secured, key: str) -> None:
    cert, private, ca = secured.authority.read()
    credentials = grpc.ssl_channel_credentials(ca, private, cert)
    options = [("grpc.ssl_target_name_override", NAME)]
    async with grpc.aio.secure_channel(secured.mesh.grpc, credentials, options=options) as channel:
        stub: Any = FrontendServiceStub(channel)
        for used, model in ((key, WORDS[0]), (WRONG_KEY, "default")):
            request = ChatRequest(model=model, messages=[ChatMessage(role="user", content=PROMPT)])
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Chat(request, metadata=(("authorization", f"Bearer {used}"),)).read()
