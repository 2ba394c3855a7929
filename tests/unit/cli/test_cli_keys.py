"""`kvmesh keys` and `kvmesh usage` against a real NATS server: what they print, store and refuse."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.cli.app import app
from kvmesh.cli.bus import with_bucket
from kvmesh.cli.usage_command import since_of
from kvmesh.common.buckets import read_all
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tenants.contract import Key
from kvmesh.frontend.tenants.tenants import Tenants
from kvmesh.frontend.tenants.usage import Used


class Cli:
    def __init__(self, nats: NatsServer, home: Path) -> None:
        self.nats = nats
        self.file = home / "mesh.yaml"
        self.config = Config.model_validate(
            {"nats": {"url": nats.url}, "tenants": {"keys": "required"}, "home": home / "state"}
        )
        self.file.write_text(yaml.safe_dump(self.config.model_dump(mode="json")))

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--config", str(self.file)], env={"COLUMNS": "200"})

    def ok(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    def stored(self, key_id: str) -> Key:
        values = asyncio.run(with_bucket(self.config, "kvmesh-keys", read_all))
        return Key.model_validate_json(values[key_id])

    def opens(self, *texts: str) -> list[str]:
        """The tenants whose keys these texts are, for a frontend; empty where they open nothing."""

        async def ask() -> list[str]:
            bus = Bus(self.nats.url, "test")
            tenants = Tenants(self.config.tenants, bus)
            await bus.start()
            await tenants.start()
            try:
                await eventually(lambda: tenants.ring.complete, 10, "the keys to be read")
                found = []
                for text in texts:
                    try:
                        found.append(tenants.caller({"authorization": f"Bearer {text}"}).tenant)
                    except KvmeshError:
                        found.append("")
                return found
            finally:
                await tenants.close()
                await bus.close()

        return asyncio.run(ask())


@pytest.fixture
def cli(nats: NatsServer, tmp_path: Path) -> Cli:
    return Cli(nats, tmp_path)


def test_a_key_is_printed_once_alone_and_kept_as_a_hash(cli: Cli) -> None:
    result = cli.run("keys", "create", "--tenant", "acme", "--rpm", "60", "--model", "smol", "--name", "ci")
    (text,) = result.stdout.splitlines()
    assert text.startswith("sk-km-")
    assert "60 requests/min" in result.stderr
    assert text not in result.stderr
    key_id = text.split("-")[2]
    key = cli.stored(key_id)
    assert (key.tenant, key.models, key.limits.requests, key.name) == ("acme", ("smol",), 60, "ci")
    values = asyncio.run(with_bucket(cli.config, "kvmesh-keys", read_all))
    assert text.split("-", 3)[3].encode() not in b"".join(values.values())
    listed = cli.ok("keys", "list")
    assert key_id in listed
    assert text not in listed
    assert cli.opens(text, text + "x") == ["acme", ""]


def test_revoked_keys_open_nothing_and_are_still_known(cli: Cli) -> None:
    made = json.loads(cli.ok("keys", "create", "--tenant", "acme", "--json"))
    other = json.loads(cli.ok("keys", "create", "--tenant", "rival", "--json"))
    cli.ok("keys", "revoke", made["id"])
    assert cli.opens(made["key"], other["key"]) == ["", "rival"]
    assert [key["id"] for key in json.loads(cli.ok("keys", "list", "--json"))] == [other["id"]]
    states = {key["id"]: key["state"] for key in json.loads(cli.ok("keys", "list", "--all", "--json"))}
    assert states == {made["id"]: "revoked", other["id"]: "live"}
    refused = cli.run("keys", "rotate", made["id"])
    assert isinstance(refused.exception, KvmeshError)


def test_rotating_replaces_the_text_and_keeps_the_rest(cli: Cli) -> None:
    made = json.loads(cli.ok("keys", "create", "--tenant", "acme", "--tpm", "500", "--json"))
    second = cli.ok("keys", "rotate", made["id"]).strip()
    assert cli.opens(made["key"], second) == ["", "acme"]
    # The text itself, pasted, names the key.
    third = cli.ok("keys", "rotate", second, "--overlap", "1h").strip()
    assert cli.opens(made["key"], second, third) == ["", "acme", "acme"]
    key = cli.stored(made["id"])
    assert key.limits.tokens == 500
    assert [secret.until > time.time() for secret in key.secrets] == [False, True]


def test_an_update_changes_what_is_named_and_nothing_else(cli: Cli) -> None:
    made = json.loads(
        cli.ok(
            "keys", "create", "--tenant", "acme", "--rpm", "60", "--tpm", "500", "--model", "smol", "--json"
        )
    )
    said = cli.run(
        "keys", "update", made["id"], "--requests-per-minute", "90", "--tpm", "0", "--expires", "1h"
    )
    assert "90 requests/min" in said.stderr
    assert "tokens/min" not in said.stderr
    key = cli.stored(made["id"])
    assert (key.tenant, key.models, key.requests_per_minute, key.tokens_per_minute) == (
        "acme",
        ("smol",),
        90,
        0,
    )
    assert key.expires > time.time()
    assert cli.opens(made["key"]) == ["acme"]
    changed = json.loads(
        cli.ok("keys", "update", made["key"], "--all-models", "--expires", "never", "--json")
    )
    assert (changed["models"], changed["expires"], changed["requests_per_minute"]) == ([], 0, 90)
    for refused in ((), ("--model", "smol", "--all-models"), ("--name", "x" * 200)):
        assert isinstance(cli.run("keys", "update", made["id"], *refused).exception, KvmeshError)
    cli.ok("keys", "revoke", made["id"])
    assert isinstance(cli.run("keys", "update", made["id"], "--rpm", "1").exception, KvmeshError)


def test_expired_keys_open_nothing(cli: Cli) -> None:
    past = json.loads(cli.ok("keys", "create", "--tenant", "acme", "--expires", "2020-01-01", "--json"))
    future = json.loads(cli.ok("keys", "create", "--tenant", "acme", "--expires", "30d", "--json"))
    assert cli.opens(past["key"], future["key"]) == ["", "acme"]
    assert past["state"] == "expired"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keys", "create", "--tenant", "no spaces"), "tenant"),
        (("keys", "create", "--tenant", "a", "--expires", "soon"), "neither a length"),
        (("keys", "revoke", "000000000000"), "there is no key 000000000000"),
        (("usage", "--since", "yesterday"), "neither a length"),
        (("usage", "--csv", "--json"), "one of them"),
    ],
)
def test_mistakes_are_named(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    result = cli.run(*arguments)
    assert isinstance(result.exception, KvmeshError)
    assert words in result.exception.message
    assert json.loads(cli.ok("keys", "list", "--all", "--json")) == []


def test_without_a_bus_they_say_what_to_do(nats_down: NatsServer, tmp_path: Path) -> None:
    for arguments in (("keys", "list"), ("keys", "create", "--tenant", "a"), ("usage",)):
        error = Cli(nats_down, tmp_path).run(*arguments).exception
        assert isinstance(error, KvmeshError)
        assert nats_down.url in error.message


def _record(cli: Cli, clock: float, process: str, *counts: tuple[str, str, Used]) -> None:
    async def run() -> None:
        bus = Bus(cli.nats.url, "test")
        tenants = Tenants(cli.config.tenants, bus, lambda: clock, process)
        await bus.start()
        await tenants.start()
        try:
            await eventually(lambda: bus.connected, 10, "the bus")
            for count in counts:
                tenants.usage.count(*count)
        finally:
            await tenants.close()
            await bus.close()

    asyncio.run(run())


def test_usage_is_summed_by_tenant_and_model(cli: Cli) -> None:
    now = time.time()
    used = Used(
        requests=1,
        prompt_tokens=100,
        cached_tokens=64,
        output_tokens=10,
        cached_device_tokens=48,
        cached_host_tokens=16,
        reasoning_tokens=4,
    )
    _record(cli, now, "one", ("acme", "org/smol.1", used), ("acme", "org/smol.1", used))
    _record(cli, now, "two", ("acme", "org/smol.1", used), ("rival", "other", used))
    _record(cli, now - 40 * 3_600, "old", ("acme", "org/smol.1", used))

    def rows(*arguments: str) -> list[dict[str, Any]]:
        return json.loads(cli.ok("usage", "--json", *arguments))

    whole = rows()
    assert whole == [
        {
            "tenant": "acme",
            "model": "org/smol.1",
            "requests": 4,
            "prompt_tokens": 400,
            "cached_tokens": 256,
            "output_tokens": 40,
            "cached_device_tokens": 192,
            "cached_host_tokens": 64,
            "cached_nvme_tokens": 0,
            "cached_network_tokens": 0,
            "reasoning_tokens": 16,
        },
        {
            "tenant": "rival",
            "model": "other",
            "requests": 1,
            "prompt_tokens": 100,
            "cached_tokens": 64,
            "output_tokens": 10,
            "cached_device_tokens": 48,
            "cached_host_tokens": 16,
            "cached_nvme_tokens": 0,
            "cached_network_tokens": 0,
            "reasoning_tokens": 4,
        },
    ]
    assert [row["requests"] for row in rows("--since", "24h")] == [3, 1]
    assert [row["tenant"] for row in rows("--tenant", "rival")] == ["rival"]
    assert rows("--tenant", "nobody") == []
    table = list(csv.DictReader(io.StringIO(cli.ok("usage", "--csv"))))
    assert table == [{name: str(value) for name, value in row.items()} for row in whole]
    # Nothing is cut, however narrow what it is printed to says that it is.
    narrow = CliRunner().invoke(app, ["usage", "--config", str(cli.file)], env={"COLUMNS": "40"}).stdout
    titles, first, *_ = narrow.splitlines()
    assert titles.endswith("cached network tokens  reasoning tokens")
    assert first.split() == ["acme", "org/smol.1", *map(str, list(whole[0].values())[2:])]


def test_since_takes_lengths_and_dates() -> None:
    assert since_of("", 1_000.0) == 0
    assert since_of("90s", 1_000.0) == 910
    assert since_of("1.5h", 10_000.0) == 4_600
    assert since_of("1970-01-02", 0.0) == 86_400
    assert since_of("1970-01-01T00:01:00+00:00", 0.0) == 60
