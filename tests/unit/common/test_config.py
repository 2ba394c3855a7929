"""The configuration: precedence, unknown keys, and messages that help."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmesh.common.config import Config, Listen, load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    return path


def refused(path: Path | None = None, overrides: dict | None = None) -> str:
    with pytest.raises(KvmeshError) as caught:
        load_config(path, overrides)
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    return caught.value.message


def test_defaults_need_no_file() -> None:
    config = load_config()
    assert config.router.policy == "kv"
    assert (config.router.addresses(), config.router.effective_addresses()) == ([], ["127.0.0.1:8100"])


def test_routers_are_one_address_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["a:1", "b:2"]
    assert load_config(None, {"router": {"address": several}}).router.effective_addresses() == several
    monkeypatch.setenv("KVMESH_ROUTER__ADDRESS", "router:8100")
    assert load_config().router.effective_addresses() == ["router:8100"]
    monkeypatch.setenv("KVMESH_ROUTER__ADDRESS", '["a:1", "b:2"]')
    config = load_config().router
    assert config.addresses() == config.effective_addresses() == several


def test_precedence_is_override_environment_file_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "router: {port: 1111, metrics_port: 1112, policy: random}\n")
    assert load_config(path).router.port == 1111
    monkeypatch.setenv("KVMESH_ROUTER__PORT", "2222")
    config = load_config(path)
    assert (config.router.port, config.router.metrics_port) == (2222, 1112)
    config = load_config(path, {"router": {"port": 3333}})
    assert (config.router.port, config.router.metrics_port, config.router.policy) == (3333, 1112, "random")


def test_an_override_leaves_the_rest_of_its_section_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_WORKER__ID", "prefill-0")
    config = load_config(overrides={"worker": {"port": 9000}})
    assert (config.worker.id, config.worker.port) == ("prefill-0", 9000)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")).router == Config().router


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ruter: {}", "unknown key `ruter`; did you mean `router`?"),
        ("router: {prot: 1}", "unknown key `router.prot`; did you mean `port`?"),
        ("engine: {mock: {speed: 2}}", "unknown key `engine.mock.speed`; did you mean `speedup`?"),
        ("router: {zzzz: 1}", "known keys:"),
        ("router: {port: 70000}", "`router.port`"),
        ("router: {port: x}", "`router.port`"),
        ("router: {address: 'a:1', replicas: 2}", "`address` must list all 2 replicas"),
        ("kvbm: {eviction: mru}", "`kvbm.eviction`"),
        ("kvbm: {nvme: {size: 1}}", "unknown key `kvbm.nvme.size`"),
        ("- a", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in refused(write(tmp_path, text))


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "router: {prot: 1}\nkvbm: {host_bytes: -1}"))
    assert "router.prot" in message
    assert "kvbm.host_bytes" in message


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_bytes("node: Zürich".encode("latin-1"))
    assert "mesh.yaml is not UTF-8: invalid start byte at byte 7" in refused(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("KVMESH_ROUTER__PORT", "many", "router.port"),
        ("KVMESH_ROUTER__PROT", "1", "router.prot"),
        ("KVMESH_MODEL__ALIASES", "[not json", "model"),
        ("KVMESH_ENGINE", "{broken", "engine"),
        ("KVMESH_ROUTER", "5", "router"),
        (
            "KVMESH_FRONTED__HTTP_PORT",
            "1",
            "KVMESH_FRONTED__HTTP_PORT: unknown key `fronted`; did you mean `frontend`?",
        ),
    ],
)
def test_malformed_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, wanted: str
) -> None:
    monkeypatch.setenv(name, value)
    assert wanted in refused()


def test_environment_reaches_nested_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_ENGINE__MOCK__SPEEDUP", "8")
    monkeypatch.setenv("KVMESH_MODEL__ALIASES", '["a", "b"]')
    monkeypatch.setenv("KVMESH_HOME", "/tmp/elsewhere")
    config = load_config()
    assert config.engine.mock.speedup == 8
    assert config.model.aliases == ["a", "b"]
    assert config.home == Path("/tmp/elsewhere")


def test_bad_overrides_are_refused() -> None:
    assert "did you mean `port`?" in refused(overrides={"router": {"prt": 1}})


def test_one_of_several_models_is_what_its_worker_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path,
        """
engine: {kind: mock, args: {tp_size: 2, dtype: x}}
models:
  - {id: default, name: one, aliases: [uno], task: embed}
  - id: default
    name: other
    engine: {page_size: 32, args: {tp_size: 1}}
    workers: {aggregated: 3}
""",
    )
    whole = load_config(path)
    one, other = whole.served()
    assert (one.model.name, one.model.aliases, one.engine.args) == ("one", ["uno"], whole.engine.args)
    # Embeddings are nobody's default while there is a model that generates.
    assert other.model.aliases == ["default"]
    assert (other.engine.kind, other.engine.page_size) == ("mock", 32)
    assert other.engine.args == {"tp_size": 1, "dtype": "x"}
    assert (other.workers.prefill, other.workers.aggregated, other.workers.drain_s) == (0, 3, 30.0)
    assert (one.workers.decode, one.workers.aggregated) == (0, 1)
    monkeypatch.setenv("KVMESH_WORKER__MODEL", "one")
    assert load_config(path).of_worker().model == one.model
    monkeypatch.setenv("KVMESH_WORKER__MODEL", "")
    assert load_config(path).of_worker().model == other.model
    monkeypatch.setenv("KVMESH_WORKER__MODEL", "third")
    with pytest.raises(KvmeshError, match="none of `models`: one, other"):
        load_config(path).of_worker()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{model: {id: x}, models: [{id: y}]}", "set `model` or `models`, not both"),
        ("models: [{id: x}, {id: x}]", "two of `models` are called x"),
        ("models: [{id: x, aliases: [y]}, {id: y}]", "two of `models` are called y"),
        ("models: [{id: x, default: true}, {id: y, aliases: [default]}]", "only one of `models`"),
        ("models: [{id: x, alias: y}]", "unknown key `models.0.alias`; did you mean `aliases`?"),
        ("models: [{id: x, workers: {agregated: 1}}]", "did you mean `aggregated`?"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in refused(write(tmp_path, text))


def test_schema_documents_every_field() -> None:
    schema = Config.model_json_schema()
    assert schema["$defs"]["RouterConfig"]["properties"]["lease_ttl_s"]["description"]


@pytest.mark.parametrize(
    ("host", "advertise", "expected"),
    [("10.0.0.5", "", "10.0.0.5"), ("0.0.0.0", "node-a", "node-a"), ("127.0.0.1", "x", "x")],
)
def test_advertised_host(host: str, advertise: str, expected: str) -> None:
    assert Listen(host=host, advertise=advertise).advertised_host() == expected


def test_a_wildcard_is_advertised_by_machine_name() -> None:
    import socket

    assert Listen(host="0.0.0.0").advertised_host() == socket.gethostname()
