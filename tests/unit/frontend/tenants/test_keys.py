"""Keys as they are issued, stored and found; the file of fixed ones; names in the usage bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fixtures.tenants import NOON, Clock, new_key
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tenants.contract import CALLER, Caller, Key, Secret, digest_of, issue, issued_id
from kvmesh.frontend.tenants.gate import duration
from kvmesh.frontend.tenants.identity import priority_of, tenant_of
from kvmesh.frontend.tenants.ring import KeyRing, read_file
from kvmesh.frontend.tenants.usage import Used, entries_of, key_of, sums
from kvmesh.v1.errors_pb2 import ErrorCode


def ring(*keys: Key, clock: Clock | None = None) -> KeyRing:
    return KeyRing(keys, None, "unused", clock or Clock())


def test_every_key_is_another() -> None:
    texts = {issue()[1] for _ in range(100)}
    assert len(texts) == 100
    for text in texts:
        assert issued_id(text)
        assert not issued_id(text[:-1])
        assert not issued_id(text + "=")
    assert issue("0123456789ab")[1].startswith("sk-km-0123456789ab-")


def test_the_ring_finds_by_text_alone() -> None:
    one, text = new_key()
    other, _ = new_key(tenant="rival")
    keys = ring(one, other)
    assert keys.find(text) == one
    # Its id with another's secret, its hash, its parts.
    for wrong in (text.replace(one.id, other.id), digest_of(text), text[6:], one.id, "", text.upper()):
        with pytest.raises(KvmeshError) as refused:
            keys.find(wrong)
        assert refused.value.code == ErrorCode.ERROR_CODE_UNAUTHENTICATED
        assert one.id not in refused.value.message


def test_keys_end_by_time_and_by_word() -> None:
    clock = Clock()
    key, text = new_key(expires=NOON + 10)
    keys = ring(key, clock=clock)
    assert keys.find(text) == key
    clock.now += 10
    with pytest.raises(KvmeshError):
        keys.find(text)
    revoked, text = new_key(revoked=NOON)
    with pytest.raises(KvmeshError):
        ring(revoked).find(text)


def test_a_replaced_text_opens_until_its_time() -> None:
    key, old = new_key()
    _, new = issue(key.id)
    secrets = (Secret(sha256=digest_of(new)), Secret(sha256=digest_of(old), until=NOON + 60))
    clock = Clock()
    keys = ring(key.model_copy(update={"secrets": secrets}), clock=clock)
    assert keys.find(old).id == keys.find(new).id == key.id
    clock.now += 60
    assert keys.find(new).id == key.id
    with pytest.raises(KvmeshError):
        keys.find(old)


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(
        "keys:\n"
        "- {id: ci, tenant: ci, key: in plain words, requests_per_minute: 60, models: [smol]}\n"
        f"- {{id: web, tenant: acme, sha256: {digest_of('hidden')}, priority: 3}}\n"
    )
    keys = ring(*read_file(str(file)))
    assert keys.find("in plain words").limits.requests == 60
    assert keys.find("hidden").priority == 3
    assert keys.find("hidden").secrets == (Secret(sha256=digest_of("hidden")),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [{id: a, tenant: a}]", "key a needs `key` or `sha256`"),
        ("keys: [{id: a, tenant: a, key: secret-words, sha256: 00}]", "sha256"),
        ("keys: [{id: a, tenant: a, key: secret-words, rpm: 3}]", "keys.0.rpm"),
        ("keys: [{id: 'a b', tenant: a, key: secret-words}]", "keys.0.id"),
        ("keys: [{id: a, tenant: a, key: x}, {id: a, tenant: b, key: secret-words}]", "more than one key"),
        ("keys: [", "not valid YAML"),
        ("- a", "keys.yaml"),
        ("keys: [{id: a, tenant: a, key: [secret-words]}]", "keys.0.key"),
    ],
)
def test_a_bad_file_is_refused_by_place_and_without_secrets(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(KvmeshError) as refused:
        read_file(str(file))
    assert words in refused.value.message
    assert "secret-words" not in refused.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvmeshError, match=r"cannot read the keys of .*nowhere"):
        read_file(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("tenant", ["", "-a", "a b", "a" * 65, "ä", "a/b"])
def test_names_are_fit_for_logs_and_metrics(tenant: str) -> None:
    with pytest.raises(ValidationError):
        Key(id="a", tenant=tenant)


def test_a_key_that_a_newer_release_wrote_is_readable() -> None:
    newer = {"id": "a", "tenant": "b", "colour": "blue", "secrets": [{"sha256": "0" * 64, "salt": "x"}]}
    key = Key.model_validate_json(json.dumps(newer))
    assert key == Key(id="a", tenant="b", secrets=(Secret(sha256="0" * 64),))


def test_who_somebody_is_and_may_say_to_be() -> None:
    key, _ = new_key(priority=2)
    caller = Caller(key)
    assert tenant_of(caller, "") == tenant_of(caller, "acme") == "acme"
    assert tenant_of(CALLER.get(), "anybody") == "anybody"
    with pytest.raises(KvmeshError, match="belongs to tenant 'acme', not to 'rival'"):
        tenant_of(caller, "rival")
    assert [priority_of(caller, wish) for wish in (0, 1, 2, 9, -5)] == [2, 1, 2, 2, -5]
    assert priority_of(CALLER.get(), 9) == 9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (-1, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (59.7, "59.7s"),
        (360, "6m0s"), (61.5, "1m1.5s"), (3_600, "1h0m0s"), (3_725, "1h2m5s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_any_name_survives_the_usage_bucket() -> None:
    names = ["", "acme", "org/model.Q4_1", "größe * > .", "-", "a=b"]
    # As they were written before tiers and reasoning were told apart.
    values = {key_of(NOON, name, name, "p"): b"[1,2,3,4]" for name in names}
    values |= {"foreign": b"[]", key_of(NOON, "a", "b", "c"): b"[1]" * 2, "1.2.3.4": b"[1,2,3,4]"}
    found = sums(entries_of(values), 0.0)
    assert set(found) == {(name, name) for name in names}
    assert found["", ""] == Used(1, 2, 3, 4)
    values[key_of(NOON, "acme", "acme", "q")] = b"[1,2,3,4,2,0,0,1,9]"
    both = sums(entries_of(values), 0.0)["acme", "acme"]
    assert both == Used(2, 4, 6, 8, cached_device_tokens=2, cached_network_tokens=1, reasoning_tokens=9)
