"""The endpoint's edge: its bounds on a request, TLS, CORS, shared ports, quiet streams, tokens and names."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fixtures.frontend import ANSWER, CONTEXT_LENGTH, MODEL, Split, chunks_of, error_of, frontend, hello
from fixtures.waiting import eventually
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError

REQUEST = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"


class Raw:
    """A connection that says exactly what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, url: str) -> Raw:
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def rest(self) -> tuple[int, dict[str, Any]]:
        """Status and error of the last answer, once the server has closed."""
        async with asyncio.timeout(30):
            raw = await self.reader.read()
        self.writer.close()
        head, _, body = raw.partition(b"\r\n\r\n")
        return int(head.split()[1]), orjson.loads(body)["error"]


async def test_headers_that_never_end_are_refused() -> None:
    async with frontend(max_header_bytes=4096) as front:
        raw = await Raw.to(front.url)
        # Not one byte more than is looked at: what comes after the answer would be answered by a reset.
        raw.writer.write(REQUEST + b"x-long: " + b"a" * 4096)
        status, error = await raw.rest()
        assert (status, error["code"]) == (431, "headers_too_large")
        whole = await front.http.get("/v1/models", headers={"x-long": "a" * 5000})
        assert (whole.status_code, error_of(whole)["code"]) == (431, "headers_too_large")
        assert (await front.http.get("/v1/models", headers={"x-long": "a" * 3000})).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_of_http_1_0_gets_no_chunks(split: Split, stream: bool) -> None:
    body = orjson.dumps(hello(stream=stream))
    raw = await Raw.to(split.front.url)
    raw.writer.write(b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(30):
        head, _, answer = (await raw.reader.read()).partition(b"\r\n\r\n")
    raw.writer.close()
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head.lower()
    if stream:
        assert (
            "".join(c["choices"][0]["delta"].get("content", "") for c in chunks_of(answer.decode())) == ANSWER
        )
    else:
        assert orjson.loads(answer)["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("begun", [REQUEST, b"G"])
async def test_headers_that_do_not_come_are_not_waited_for(begun: bytes) -> None:
    async with frontend(header_timeout_s=0.2) as front:
        raw = await Raw.to(front.url)
        raw.writer.write(begun)
        status, error = await raw.rest()
        assert (status, error["code"]) == (408, "request_timeout")


async def test_connections_that_drip_are_closed_and_leave_nothing() -> None:
    """Each sends a byte now and then, headers or body, for as long as it is let."""
    process = psutil.Process()
    async with frontend(header_timeout_s=0.5, body_timeout_s=0.5) as front:

        async def drip(number: int) -> int:
            raw = await Raw.to(front.url)
            whole = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
            raw.writer.write(whole if number % 2 else b"GET /")
            answer = asyncio.create_task(raw.reader.read(32))
            while not answer.done():
                raw.writer.write(b"a")
                await asyncio.wait([answer], timeout=0.05)
            raw.writer.transport.abort()
            return int(answer.result().split()[1])

        await drip(0)
        before = process.num_fds()
        assert await asyncio.gather(*map(drip, range(100))) == [408] * 100
        await eventually(lambda: process.num_fds() <= before, what="the connections to be closed")


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async with frontend(body_timeout_s=0.2) as front:
        raw = await Raw.to(front.url)
        raw.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
        raw.writer.write(b"content-length: 100\r\n\r\n{")
        status, error = await raw.rest()
        assert (status, error["code"]) == (408, "request_timeout")


async def test_what_is_no_http_is_answered_like_everything_else() -> None:
    async with frontend() as front:
        raw = await Raw.to(front.url)
        raw.writer.write(b"\x16\x03\x01 is not HTTP\r\n\r\n")
        status, error = await raw.rest()
        assert (status, error["code"]) == (400, "invalid_value")
        raw = await Raw.to(front.url)
        raw.writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\n\0: y\r\n\r\n")
        status, error = await raw.rest()
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert "param" in error
        # A body's, too, while it is waited for.
        raw = await Raw.to(front.url)
        raw.writer.write(
            b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno size\r\n"
        )
        status, error = await raw.rest()
        assert (status, error["code"]) == (400, "invalid_value")
        assert "not valid HTTP" in error["message"]


async def test_deep_json_is_refused(split: Split) -> None:
    deep = b'{"model": "smol", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    answer = await split.front.http.post("/v1/chat/completions", content=deep)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_value")


async def test_pages_of_named_origins_may_ask() -> None:
    async with frontend(cors={"origins": ["https://chat.example"]}) as front:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        path = "/v1/chat/completions"
        allowed = await front.http.options(path, headers={"origin": "https://chat.example", **ask})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        refused = await front.http.options(path, headers={"origin": "https://evil.example", **ask})
        assert "access-control-allow-origin" not in refused.headers
        answer = await front.http.get("/v1/models", headers={"origin": "https://chat.example"})
        assert "x-ratelimit-remaining-requests" in answer.headers["access-control-expose-headers"]
    async with frontend() as front:
        answer = await front.http.get("/v1/models", headers={"origin": "https://chat.example"})
        assert "access-control-allow-origin" not in answer.headers


def certificate(directory: Path, name: str) -> Path:
    """A certificate of its own for 127.0.0.1, and its key, written over what was there."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file = directory / "cert.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(private)
    return file


async def common_name(url: str) -> str:
    """Of the certificate that a new connection is shown."""
    host, port = url.split("//")[1].split(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return str(x509.load_der_x509_certificate(shown).subject.rfc4514_string())


async def test_tls_serves_and_takes_a_new_certificate_while_it_does(tmp_path: Path) -> None:
    file = certificate(tmp_path, "first")
    tls = {"cert": str(file), "key": str(tmp_path / "key.pem")}
    async with frontend(tls=tls) as front:
        url = front.url.replace("http://", "https://")
        trust = ssl.create_default_context(cafile=str(file))
        async with httpx.AsyncClient(base_url=url, verify=trust) as client:
            assert (await client.get("/health")).status_code == 200
            assert await common_name(url) == "CN=first"
            # Half a replacement is none.
            (tmp_path / "key.pem").write_text("not a key")
            await asyncio.sleep(1.2)
            assert await common_name(url) == "CN=first"
            certificate(tmp_path, "second")
            for _ in range(100):
                if await common_name(url) == "CN=second":
                    break
                await asyncio.sleep(0.1)
            assert await common_name(url) == "CN=second"
            # The connection there was is still the first's.
            assert (await client.get("/health")).status_code == 200


async def test_clients_without_a_certificate_are_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    file, authority = certificate(tmp_path, "server"), certificate(tmp_path / "clients", "client")
    tls = {"cert": str(file), "key": str(tmp_path / "key.pem"), "client_ca": str(authority)}
    async with frontend(tls=tls) as front:
        url = front.url.replace("http://", "https://")
        trust = ssl.create_default_context(cafile=str(file))
        async with httpx.AsyncClient(base_url=url, verify=trust) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/health")
        trust = ssl.create_default_context(cafile=str(file))
        trust.load_cert_chain(authority, tmp_path / "clients" / "key.pem")
        async with httpx.AsyncClient(base_url=url, verify=trust) as client:
            assert (await client.get("/health")).status_code == 200


async def test_unusable_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("nothing")
    for cert in ("absent.pem", "key.pem"):
        tls = {"cert": str(tmp_path / cert), "key": str(tmp_path / "key.pem")}
        with pytest.raises(KvmeshError, match=r"cannot use the certificate .*frontend\.tls"):
            async with frontend(tls=tls):
                pass
    with pytest.raises(KvmeshError, match="needs both"):
        load_config(None, {"frontend": {"tls": {"cert": "a.pem"}}})


async def test_frontends_share_a_port_where_they_are_told_to() -> None:
    async with frontend(processes=2) as one:
        port = one.http_server.port
        async with frontend(processes=2, http_port=port) as two:
            assert two.http_server.port == port
            assert (await one.http.get("/health")).status_code == 200
        with pytest.raises(KvmeshError, match="cannot listen"):
            async with frontend(http_port=port):
                pass


async def test_a_quiet_stream_says_that_it_lives(split: Split, answer_ids: list[int]) -> None:
    async with frontend(keepalive_s=0.05, discovery=split.front.discovery) as front:
        await eventually(lambda: front.models.ready, 30, "the frontend to be ready")
        split.decode.step_s = 0.3
        answer = await front.http.post("/v1/chat/completions", json=hello(stream=True, max_tokens=4))
        events = [event for event in answer.text.split("\n\n") if event]
        comments = [event for event in events if event.startswith(":")]
        assert len(comments) >= 3
        assert set(comments) == {": keep-alive"}
        rest = [event for event in events if not event.startswith(":")]
        assert rest[-1] == "data: [DONE]"
        assert all(orjson.loads(event.removeprefix("data: ")) for event in rest[:-1])
        # An openai client sees none of it.
        front.openai.base_url = httpx.URL(f"{front.url}/v1")
        message: Any = {"role": "user", "content": "hello"}
        stream = await front.openai.chat.completions.create(
            model=MODEL, messages=[message], max_tokens=3, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
        whole = await front.http.post("/v1/chat/completions", json=hello(max_tokens=2))
        assert whole.json()["choices"]


async def test_tokens_of_texts_and_chats(split: Split) -> None:
    async def ask(path: str, **fields: Any) -> httpx.Response:
        return await split.front.http.post(path, json={"model": MODEL, **fields})

    text = "Grüße, 世界 🗼"
    made = (await ask("/v1/tokenize", prompt=text)).json()
    assert made["count"] == len(made["tokens"]) > 3
    assert made["max_model_len"] == CONTEXT_LENGTH
    back = (await ask("/v1/detokenize", tokens=made["tokens"])).json()
    assert back == {"text": text, "prompt": text}
    messages = [{"role": "user", "content": "hello"}]
    chat = (await ask("/v1/tokenize", messages=messages)).json()
    used = (await split.front.chat(max_tokens=1)).json()["usage"]["prompt_tokens"]
    assert chat["count"] == used
    special = (await ask("/v1/detokenize", tokens=chat["tokens"], skip_special_tokens=True)).json()["text"]
    assert "hello" in special
    assert "<|im_start|>" not in special
    for path, fields, param in (
        ("/v1/tokenize", {}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "messages": messages}, "prompt"),
        ("/v1/tokenize", {"messages": []}, "messages"),
        ("/v1/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/v1/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/v1/detokenize", {}, "tokens"),
    ):
        answer = await ask(path, **fields)
        assert (answer.status_code, error_of(answer)["param"]) == (400, param), (path, fields)
    unknown = await split.front.http.post("/v1/tokenize", json={"model": "gpt-5", "prompt": "a"})
    assert unknown.status_code == 404


async def test_models_have_the_gateways_names_too(split: Split) -> None:
    aliases = {"gpt-4o": "default", "mine": MODEL, "nobody": "absent"}
    async with frontend(aliases=aliases, discovery=split.front.discovery) as front:
        await eventually(lambda: front.models.ready, 30, "the frontend to be ready")
        for name in ("gpt-4o", "mine", MODEL, "default"):
            answer = await front.chat(model=name, max_tokens=1)
            assert answer.status_code == 200, name
            assert answer.json()["model"] == MODEL
        unknown = await front.chat(model="nobody")
        assert unknown.status_code == 404
        assert "'nobody'" in error_of(unknown)["message"]
        model = (await front.http.get("/v1/models/gpt-4o")).json()
        assert model["id"] == MODEL
        assert model["context_length"] == model["max_model_len"] == CONTEXT_LENGTH
        assert model["aliases"] == ["default", "gpt-4o", "mine"]
        assert model["capabilities"]["chat"] is True
