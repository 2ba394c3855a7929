"""What `kvmesh up` checks and plans before it starts anything."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cli import devices, ports
from kvmesh.cli.home import Home
from kvmesh.cli.pids import MARKER
from kvmesh.cli.plan import base_environment, plan
from kvmesh.cli.settings import check_workers, endpoint_url, load, model_flags
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError

FREE = {
    "frontend": {"port": 0, "http_port": 0, "metrics_port": 0},
    "router": {"port": 0, "metrics_port": 0},
    "kvbm": {"port": 0, "metrics_port": 0},
    "nats": {"port": 0},
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.create()
    return home


def test_taken_ports_are_all_named_with_owner_and_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("0.0.0.0", 0)) as two:
        taken = one.getsockname()[1], two.getsockname()[1]
        config = load_config(
            None,
            FREE | {"frontend": FREE["frontend"] | {"http_port": taken[0]}, "nats": {"port": taken[1]}},
        )
        with pytest.raises(KvmeshError) as caught:
            ports.check(config)
    first, second = caught.value.message.splitlines()
    assert first.startswith(f"port {taken[0]} is taken by ")
    assert f"(pid {os.getpid()})" in first
    assert "set `frontend.http_port` (or KVMESH_FRONTEND__HTTP_PORT) to another one" in first
    assert f"port {taken[1]} is taken" in second
    assert "`nats.port`" in second


def test_a_port_given_twice_is_refused() -> None:
    config = load_config(None, FREE | {"router": {"port": 7777}, "kvbm": {"port": 7777}})
    with pytest.raises(KvmeshError, match=r"port 7777 is both `router.port` and `kvbm.port`"):
        ports.check(config)


def test_ports_of_what_is_not_started_do_not_matter() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = load_config(
            None,
            FREE
            | {
                "nats": {"port": port, "url": "nats://other:4222"},
                "kvbm": {"port": port, "enabled": False},
            },
        )
        ports.check(config)


def test_zero_becomes_a_free_port_that_outgoing_connections_do_not_use() -> None:
    config = ports.assign(load_config(None, FREE))
    chosen = [port.port for port in ports.configured(config)]
    assert len(set(chosen)) == len(chosen) == 8
    assert all(10_000 <= port < 32_768 for port in chosen)
    ports.check(config)


def test_the_plan_names_every_process_and_keeps_worker_ports_apart(home: Home) -> None:
    config = load_config(
        None, {"engine": {"kind": "mock"}, "workers": {"prefill": 2, "decode": 1, "aggregated": 1}}
    )
    specs = plan(config, home, {})
    assert [spec.name for spec in specs] == [
        "nats", "router", "kvbm", "prefill-0", "prefill-1", "decode-0", "aggregated-0", "frontend"
    ]  # fmt: skip
    workers = [spec for spec in specs if "KVMESH_WORKER__ID" in spec.environment]
    assert [spec.environment["KVMESH_WORKER__ID"] for spec in workers] == [spec.name for spec in specs[3:7]]
    assert len({spec.environment["KVMESH_WORKER__PORT"] for spec in workers}) == 4
    assert specs[6].command[1:3] == ["-m", "kvmesh.decode"]
    assert specs[6].command[-2:] == ["--role", "aggregated"]
    assert {spec.name: spec.stage for spec in specs}["frontend"] == 0
    assert specs[0].stage == max(spec.stage for spec in specs)


def test_further_routers_have_ports_of_their_own(home: Home) -> None:
    log = {"path": "/var/log/decisions"}
    wanted = {"engine": {"kind": "mock"}, "router": {"replicas": 3, "port": 0, "decision_log": log}}
    config = ports.assign(load_config(None, wanted))
    # Frontends and commands find them by their registrations.
    assert config.router.addresses() == []
    specs = [spec for spec in plan(config, home, {}) if spec.role == "router"]
    assert [spec.name for spec in specs] == ["router", "router-1", "router-2"]
    addresses = [spec.address for spec in specs]
    assert addresses[0] == f"127.0.0.1:{config.router.port}"
    assert len(set(addresses)) == 3
    assert specs[2].environment["KVMESH_ROUTER__PORT"] == addresses[2].rpartition(":")[2]
    assert specs[2].environment["KVMESH_ROUTER__DECISION_LOG__PATH"] == "/var/log/decisions-2"
    # Where they are given they stay as they are.
    given = ["127.0.0.1:9001", "127.0.0.1:9002"]
    config = ports.assign(load_config(None, {"router": {"replicas": 2, "address": given}}))
    assert config.router.addresses() == given
    specs = [spec for spec in plan(config, home, {}) if spec.name == "router-1"]
    assert [spec.address for spec in specs] == given[1:]


def test_a_bus_of_others_is_not_started_and_workers_carry_the_nodes_name(home: Home) -> None:
    config = load_config(
        None, {"nats": {"url": "nats://bus:4222"}, "node": "rack7", "kvbm": {"enabled": False}}
    )
    specs = plan(config, home, {})
    workers = {spec.name: spec for spec in specs if spec.role in ("prefill", "decode")}
    assert "nats" not in {spec.name for spec in specs}
    assert list(workers) == ["prefill-0", "decode-0"]
    assert workers["prefill-0"].environment["KVMESH_WORKER__ID"] == "rack7-prefill-0"


@pytest.mark.parametrize(
    ("gpu", "engine", "forkserver"),
    [
        (False, {}, "the mesh's own"),
        (True, {}, None),
        (False, {"kind": "mock"}, None),
        (False, {"forkserver": False}, None),
        (False, {"forkserver_socket": "/run/other"}, "/run/other"),
    ],
)
def test_engines_on_a_cpu_are_forked(
    home: Home, monkeypatch: pytest.MonkeyPatch, gpu: bool, engine: dict[str, Any], forkserver: str | None
) -> None:
    monkeypatch.setattr("kvmesh.cli.plan.has_gpu", lambda: gpu)
    monkeypatch.setattr("kvmesh.cli.devices.visible", lambda _environment: [])
    config = load_config(None, {"engine": engine})
    specs = {spec.name: spec for spec in plan(config, home, {"PATH": ""})}
    own = specs.get("sglang")
    assert (own is not None) == (forkserver == "the mesh's own")
    for worker in ("prefill-0", "decode-0"):
        asked = specs[worker].environment.get("KVMESH_ENGINE__FORKSERVER_SOCKET")
        if own is not None:
            # What it imports reads the same settings as in an engine's own process.
            assert asked in own.command
            for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
                assert own.environment[name] == specs[worker].environment[name]
        else:
            assert (asked or config.engine.forkserver_socket) == (forkserver or "")


def test_configuration_is_not_inherited_twice(home: Home) -> None:
    inherited = {
        "PATH": "/bin",
        "KVMESH_ENGINE__KIND": "mock",
        "kvmesh_router__port": "1",
        "KVMESH_HOME": "/elsewhere",
        "KVMESH_WORKER__ID": "x",
        "KVMESH_TRACES": "/traces",
    }
    environment = base_environment(inherited, home)
    assert environment == {
        "PATH": f"{Path(sys.executable).parent}:/bin",
        "KVMESH_TRACES": "/traces",
        MARKER: str(home.root),
        "PYTHONUNBUFFERED": "1",
    }


def test_engines_share_the_cores_of_a_cpu(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.cli.plan.has_gpu", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))

    def threads(inherited: dict[str, str], **workers: int) -> list[str | None]:
        specs = plan(load_config(None, {"workers": workers}), home, inherited)
        return [
            spec.environment.get("OMP_NUM_THREADS") for spec in specs if spec.role in ("prefill", "decode")
        ]

    assert threads({"PATH": ""}, prefill=1, decode=1) == ["4", "4"]
    assert threads({"PATH": ""}, prefill=2, decode=8) == ["1"] * 10
    assert threads({"OMP_NUM_THREADS": "3"}, prefill=1, decode=1) == ["3", "3"]


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ({"prefill": 0, "decode": 0}, "no workers"),
        ({"prefill": 1, "decode": 0}, r"set `workers.decode` to 1 or more"),
        ({"prefill": 0, "decode": 2}, r"set `workers.prefill` to 1 or more"),
    ],
)
def test_workers_that_could_not_serve_are_refused(workers: dict[str, int], said: str) -> None:
    with pytest.raises(KvmeshError, match=said):
        check_workers(load_config(None, {"workers": workers}))


def test_the_short_port_variable_yields_to_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMESH_FRONTEND__HTTP_PORT", raising=False)
    monkeypatch.setenv("KVMESH_PORT", "9001")
    assert endpoint_url(load(None)) == "http://localhost:9001"
    monkeypatch.setenv("KVMESH_FRONTEND__HTTP_PORT", "9002")
    assert endpoint_url(load(None)) == "http://localhost:9002"


def test_the_written_configuration_reads_back(home: Home) -> None:
    config = ports.assign(load_config(None, FREE | {"engine": {"kind": "mock"}, "home": str(home.root)}))
    home.write_config(config)
    assert home.read_config().model_dump() == config.model_dump()


def test_engines_that_share_a_gpu_start_in_turn_with_a_part_of_what_is_left() -> None:
    engine = load_config(None).engine
    parts = devices.divide({"prefill-0": engine, "decode-0": engine}, ["0"])
    assert parts == {
        "prefill-0": devices.Devices(("0",), 0.4),
        # 40 % of the whole is two thirds of the 60 % that the first has left.
        "decode-0": devices.Devices(("0",), 0.667, after="prefill-0"),
    }


def test_engines_with_gpus_of_their_own_take_what_they_like() -> None:
    engine = load_config(None, {"engine": {"decode_args": {"tp-size": 2}}}).engine
    parts = devices.divide({"prefill-0": engine, "decode-0": engine}, ["4", "5", "6"])
    assert parts == {"prefill-0": devices.Devices(("4",)), "decode-0": devices.Devices(("5", "6"))}


def test_every_model_has_workers_of_its_own(home: Home) -> None:
    models = [
        {"id": "default", "name": "one", "workers": {"aggregated": 2}},
        {"id": "default", "name": "other", "engine": {"page_size": 32}},
        {"id": "default", "name": "vectors", "task": "embed"},
    ]
    config = load_config(None, {"engine": {"kind": "mock"}, "models": models})
    check_workers(config)
    workers = {spec.name: spec.environment for spec in plan(config, home, {}) if spec.name[-1].isdigit()}
    assert {name: environment["KVMESH_WORKER__MODEL"] for name, environment in workers.items()} == {
        "aggregated-0": "one",
        "aggregated-1": "one",
        "prefill-0": "other",
        "decode-0": "other",
        "aggregated-2": "vectors",
    }


def test_engines_of_several_models_share_the_gpus() -> None:
    small, large = load_config(None).engine, load_config(None, {"engine": {"args": {"tp_size": 2}}}).engine
    parts = devices.divide({"aggregated-0": small, "aggregated-1": large}, ["0", "1", "2"])
    assert [parts[name].ids for name in parts] == [("0",), ("1", "2")]


def test_workers_that_could_not_serve_their_model_are_named_with_it() -> None:
    def refused(**other: object) -> str:
        models = [{"id": "default", "name": "one"}, {"id": "default", "name": "other", **other}]
        with pytest.raises(KvmeshError) as caught:
            check_workers(load_config(None, {"models": models}))
        return caught.value.message

    assert "no workers of model other" in refused(workers={})
    assert "of model other work in pairs" in refused(workers={"prefill": 1})
    assert "model other takes no prefill and decode workers" in refused(task="embed", workers={"decode": 1})


def test_model_flags_are_one_model_or_several() -> None:
    file = {"models": [{"id": "default", "name": "one"}, {"id": "x"}]}
    one = load_config(None, file | model_flags(["./mine"]))
    assert (one.model.id, one.models) == ("./mine", [])
    several = load_config(None, {"model": {"id": "x"}} | model_flags(["./mine", "default"]))
    assert [served.model.id for served in several.served()] == ["./mine", "default"]
    assert [served.model.aliases for served in several.served()] == [["default"], []]


def test_a_configured_memory_fraction_stands(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.cli.plan.has_gpu", lambda: True)
    config = load_config(None, {"engine": {"prefill_args": {"mem_fraction_static": 0.3}}})
    specs = {spec.name: spec for spec in plan(config, home, {"CUDA_VISIBLE_DEVICES": "7"})}
    prefill, decode = specs["prefill-0"], specs["decode-0"]
    assert prefill.environment["CUDA_VISIBLE_DEVICES"] == decode.environment["CUDA_VISIBLE_DEVICES"] == "7"
    assert "KVMESH_ENGINE__ARGS" not in prefill.environment
    assert json.loads(decode.environment["KVMESH_ENGINE__ARGS"]) == {"mem_fraction_static": 0.667}
    assert decode.after == "prefill-0"
    assert "OMP_NUM_THREADS" not in decode.environment
