"""One YAML file configures every role; this is its schema.

Precedence: command-line flag > environment (`KVMESH_ROUTER__PORT=9000`) > file > default. Unknown
keys are refused with the nearest known one. Roles get the whole configuration and read their part.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from kvmesh.common.config_problems import check_sections, explain
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.served import (
    EngineConfig,
    ModelConfig,
    Section,
    ServedModelConfig,
    WorkersConfig,
    check_names,
    default_of,
    parts,
)

Port = Annotated[int, Field(ge=0, le=65535)]
GIB = 1 << 30
MIB = 1 << 20


class Listen(Section):
    """Where a role's gRPC server listens."""

    host: str = "127.0.0.1"
    """address to bind"""
    port: Port = 0
    """gRPC port; 0 takes a free one"""
    metrics_port: Port = 0
    """HTTP port of /metrics and /health; 0 takes a free one"""
    advertise: str = ""
    """host other roles reach this one by; empty: `host`, or this machine's name when that is a wildcard"""
    reflection: bool = False
    """serve gRPC reflection"""

    def advertised_host(self) -> str:
        if self.advertise:
            return self.advertise
        return socket.gethostname() if self.host in ("0.0.0.0", "::", "") else self.host


class MeshTlsConfig(Section):
    """TLS between the mesh's own processes. Each has one certificate, to serve and to call by."""

    cert: str = ""
    """certificate chain, PEM; empty: plain connections. Files that change are read again"""
    key: str = ""
    """its private key, PEM"""
    ca: str = ""
    """authorities that have signed the mesh's certificates, PEM"""
    client_auth: Literal["require", "none"] = "require"
    """whether callers must show a certificate, too"""
    server_name: str = ""
    """name all servers' certificates carry; empty: each its own address"""

    @model_validator(mode="after")
    def _complete(self) -> MeshTlsConfig:
        if len({bool(self.cert), bool(self.key), bool(self.ca)}) > 1:
            raise ValueError("needs all of `cert`, `key` and `ca`")
        return self

    def whole_paths(self) -> MeshTlsConfig:
        """The same from wherever it is read."""
        files = {name: getattr(self, name) for name in ("cert", "key", "ca")}
        return self.model_copy(update={k: str(Path(v).expanduser().resolve()) for k, v in files.items() if v})


class NatsConfig(Section):
    url: str = ""
    """server to use; empty: start one and use it"""
    host: str = "127.0.0.1"
    """address of the server that is started"""
    port: Port = 4222
    """port of the server that is started"""
    tls: MeshTlsConfig = MeshTlsConfig()
    """of connections to `url`; empty: plain ones. The server that is started has the mesh's `tls`"""

    def effective_url(self) -> str:
        return self.url or f"nats://{self.host}:{self.port}"


class DiscoveryConfig(Section):
    kind: Literal["nats", "static"] = "nats"
    """`nats`: leases in a JetStream KV bucket; `static`: a YAML list of workers"""
    bucket: str = "kvmesh-workers"
    """JetStream KV bucket of workers"""
    routers_bucket: str = "kvmesh-routers"
    """JetStream KV bucket of routers"""
    file: str = ""
    """worker list, for `static`"""
    heartbeat_s: float = Field(default=1.0, gt=0)
    """seconds between renewals of a lease"""
    ttl_s: float = Field(default=4.0, gt=0)
    """seconds without renewal after which a worker or router is gone"""


class TlsConfig(Section):
    cert: str = ""
    """certificate chain, PEM; empty: plain HTTP. Files that change are read again"""
    key: str = ""
    """its private key, PEM"""
    client_ca: str = ""
    """authorities of client certificates, PEM; empty: clients need none"""

    @model_validator(mode="after")
    def _complete(self) -> TlsConfig:
        if bool(self.cert) != bool(self.key) or (self.client_ca and not self.cert):
            raise ValueError("needs both `cert` and `key`")
        return self


class CorsConfig(Section):
    origins: list[str] = []
    """web origins whose pages may call the API, e.g. https://chat.example.com, or `*`; empty: none"""
    headers: list[str] = ["*"]
    """request headers such pages may send"""
    credentials: bool = False
    """let them send cookies"""
    max_age_s: int = Field(default=600, ge=0)
    """seconds a browser may remember this"""


class StoreConfig(Section):
    """Answers that clients may come back to: those of /v1/responses."""

    path: str = ""
    """SQLite file; empty: `answers.db` in the state directory; `:memory:`: nothing outlives the process"""
    max_age_s: float = Field(default=30 * 86_400.0, gt=0)
    """an answer that nobody has asked for or continued for so long is forgotten"""
    max_bytes: int = Field(default=1 * GIB, gt=0)
    """bytes of all that is kept; those unused for longest are forgotten first"""


class FrontendConfig(Listen):
    port: Port = 8001
    http_port: Port = 8000
    """port of the OpenAI endpoint"""
    metrics_port: Port = 8002
    max_body_bytes: int = Field(default=16 << 20, gt=0)
    """larger request bodies are refused with 413"""
    body_timeout_s: float = Field(default=120.0, gt=0)
    """a body that is not whole by then is refused with 408"""
    max_header_bytes: int = Field(default=64 << 10, ge=1024)
    """larger request headers are refused with 431"""
    header_timeout_s: float = Field(default=20.0, gt=0)
    """headers that are not whole by then are refused with 408"""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """a client that takes nothing of what waits for it for so long is cut off"""
    keepalive_s: float = Field(default=15.0, ge=0)
    """a comment is sent in a stream that was quiet for so long; 0: never"""
    processes: int = Field(default=1, ge=1, le=256)
    """frontends that `kvmesh up` starts on `http_port`; the system spreads connections over them"""
    aliases: dict[str, str] = {}
    """further names of models, e.g. `gpt-4o: my-model`; `default` is what requests without a model mean"""
    tls: TlsConfig = TlsConfig()
    cors: CorsConfig = CorsConfig()
    request_timeout_s: float = Field(default=600.0, gt=0)
    """a request is ended after this long"""
    recovery_s: float = Field(default=60.0, ge=0)
    """how long an answer whose worker was lost waits for another one, when none is left"""
    store: StoreConfig = StoreConfig()
    drain_s: float = Field(default=30.0, ge=0)
    """longest wait for live requests at shutdown"""
    log_prompts: bool = False
    """log each prompt's text, as the model gets it; by default no log has any of it"""


class DecisionLogConfig(Section):
    path: str = ""
    """directory of the decision log, this router's alone; empty: none is written"""
    max_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """a file of this size is followed by another"""
    max_files: int = Field(default=8, ge=1)
    """files kept of each model; the oldest go"""


class TenantsConfig(Section):
    """Who may ask, how much, and whose cache is whose."""

    keys: Literal["off", "required"] = "off"
    """required: requests need an API key (`kvmesh keys create`)"""
    keys_file: str = ""
    """YAML file with further keys; read at start"""
    share_cache: bool = False
    """let tenants use one another's cached blocks"""
    assumed_output_tokens: int = Field(default=256, ge=0)
    """output a request without max_tokens is charged in advance; settled when it ends"""
    usage_days: int = Field(default=400, ge=1)
    """days usage is kept"""
    keys_bucket: str = "kvmesh-keys"
    """JetStream KV bucket of keys"""
    quotas_bucket: str = "kvmesh-quotas"
    """JetStream KV bucket of what is left of each key's limits"""
    usage_bucket: str = "kvmesh-usage"
    """JetStream KV bucket of usage"""


class RouterConfig(Listen):
    port: Port = 8100
    metrics_port: Port = 8101
    replicas: int = Field(default=1, ge=1, le=16)
    """routers that `kvmesh up` starts; the first has this section's ports, the others free ones"""
    address: str | list[str] = ""
    """host:port frontends and commands use, or a list of all replicas'; empty: those that have registered"""
    policy: str = "kv"
    """kv, round-robin, random, least-loaded, power-of-two, session, or one that a package adds"""
    temperature: float = Field(default=0.0, ge=0)
    """0: the lowest cost wins; more softens the choice"""
    explained_requests: int = Field(default=4096, ge=0)
    """requests whose placements `kvmesh router explain` still knows"""
    lease_ttl_s: float = Field(default=30.0, gt=0)
    """a lease neither renewed nor freed for this long is reclaimed"""
    max_waiting: int = Field(default=1024, ge=0)
    """requests that wait for room at most, for each model"""
    max_wait_s: float = Field(default=30.0, gt=0)
    """a request is placed within this time, or refused"""
    tenant_weights: dict[str, float] = {}
    """shares of tenants while requests wait; 1 for those not named"""
    index_max_bytes: int = Field(default=1 * GIB, gt=0)
    """memory the prefix index may take"""
    shadow: list[str] = []
    """policies that look on: what they would have chosen is counted and shown, and changes nothing"""
    decision_log: DecisionLogConfig = DecisionLogConfig()

    @model_validator(mode="after")
    def _addressed(self) -> RouterConfig:
        if self.address and self.replicas > len(self.effective_addresses()):
            raise ValueError(f"`address` must list all {self.replicas} replicas, or be empty")
        return self

    def addresses(self) -> list[str]:
        """As configured; empty: none is."""
        named = [self.address] if isinstance(self.address, str) else self.address
        return [address for address in named if address]

    def effective_addresses(self) -> list[str]:
        """Those, or this section's own."""
        return self.addresses() or [f"{self.advertised_host()}:{self.port}"]


class NvmeTierConfig(Section):
    path: str = ""
    """directory of the nvme tier, its alone; empty: no such tier"""
    capacity: int = Field(default=64 * GIB, gt=0)
    """bytes it may hold; allocated at start"""
    bytes_per_day: int = Field(default=0, ge=0)
    """bytes written to it a day, so that the disk lasts; 0: no limit"""


class ObjectTierConfig(Section):
    url: str = ""
    """`s3://bucket/prefix` or `fs:///path`, which all stores of the mesh share; empty: no object storage"""
    capacity: int = Field(default=1024 * GIB, gt=0)
    """bytes that may be there, of all stores together; the same for all of them"""
    endpoint: str = ""
    """of S3, where it is not Amazon's: `http://host:port`"""
    region: str = ""
    """of S3; empty: `AWS_REGION`, or us-east-1"""
    access_key_id_env: str = "AWS_ACCESS_KEY_ID"
    """environment variable with the key's id; where it is not set, files and the machine's role are asked"""
    secret_access_key_env: str = "AWS_SECRET_ACCESS_KEY"
    """environment variable with the key"""
    session_token_env: str = "AWS_SESSION_TOKEN"
    """environment variable with the token of a key that is lent for a time"""
    timeout_s: float = Field(default=10.0, gt=0)
    """for one call; a service that takes longer takes the tier out until it answers again"""
    refresh_s: float = Field(default=300.0, gt=0)
    """from one listing, which finds what other stores wrote and deleted, to the next"""


class KvbmConfig(Listen):
    port: Port = 8200
    metrics_port: Port = 8201
    enabled: bool = True
    """keep KV past the device's eviction"""
    id: str = "kvbm-0"
    """name of this node's store"""
    host_bytes: int = Field(default=2 * GIB, gt=0)
    """size of the host tier (shared memory)"""
    socket: str = ""
    """unix socket engines connect to; empty: in the state directory"""
    shm_dir: str = "/dev/shm"
    """directory of the arena file; must be memory-backed"""
    eviction: Literal["default", "class-index", "lru", "gdsf", "s3-fifo"] = "default"
    """which blocks leave a full tier; `default`: learned laws of return, LRU and GDSF by vote"""
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """tenants' shares of a full host tier; `*`: of each that is not named, else 1; empty: there are none"""
    nvme: NvmeTierConfig = NvmeTierConfig()
    object: ObjectTierConfig = ObjectTierConfig()
    pin_bytes_per_tenant: int = Field(default=0, ge=0)
    """bytes of the host tier each tenant may pin; 0: a quarter of it"""
    scrub_bytes_per_s: int = Field(default=32 * MIB, ge=0)
    """how fast blocks at rest are checked, over all tiers; 0: only those that are read"""


class WorkerConfig(Listen):
    """This process's own identity, when it is a worker; the supervisor and compose set it by environment."""

    id: str = ""
    """e.g. prefill-0; empty: role, host name and process id"""
    model: str = ""
    """name (or id) of its entry in `models`; empty: the default one"""
    bootstrap_port: Port = 0
    """port decode workers fetch KV addresses from; 0 takes a free one"""


class TelemetryConfig(Section):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "text"] = "auto"
    """auto: text on a terminal, JSON lines elsewhere"""
    otlp_endpoint: str = ""
    """OTLP/gRPC collector for traces, e.g. http://localhost:4317; empty: none"""


class Config(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        env_prefix="KVMESH_", env_nested_delimiter="__", extra="forbid", use_attribute_docstrings=True
    )

    model: ModelConfig = ModelConfig()
    models: list[ServedModelConfig] = []
    """several models, each as `model` and with workers of its own; then `model` is not set"""
    workers: WorkersConfig = WorkersConfig()
    engine: EngineConfig = EngineConfig()
    frontend: FrontendConfig = FrontendConfig()
    tenants: TenantsConfig = TenantsConfig()
    router: RouterConfig = RouterConfig()
    kvbm: KvbmConfig = KvbmConfig()
    nats: NatsConfig = NatsConfig()
    tls: MeshTlsConfig = MeshTlsConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    worker: WorkerConfig = WorkerConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    node: str = Field(default_factory=socket.gethostname)
    """name of this machine; workers of one node share host tiers"""
    home: Path = Field(default_factory=lambda: default_home())
    """directory of state, sockets and logs"""
    cache_dir: Path = Field(default_factory=lambda: default_cache_dir())
    """directory of prepared models"""

    @model_validator(mode="after")
    def _models_are_told_apart(self) -> Self:
        if self.models and self.model != ModelConfig():
            raise ValueError("set `model` or `models`, not both")
        check_names(self.models)
        return self

    def served(self) -> list[Config]:
        """The configuration as each model's workers have it: `model`, `engine` and `workers` are its own."""
        if not self.models:
            return [self]
        default = default_of(self.models)
        return [
            self.model_copy(update=parts(model, model is default, self.engine, self.workers))
            for model in self.models
        ]

    def of_worker(self) -> Config:
        """The configuration as the worker of this process has it. Raises KvmeshError for an unknown model."""
        if not self.models:
            return self
        wanted = self.worker.model
        for config in self.served():
            names = [config.model.name, config.model.id] if wanted else config.model.aliases
            if (wanted or "default") in names:
                return config
        known = ", ".join(model.key for model in self.models)
        raise invalid(f"`worker.model` {wanted!r} is none of `models`: {known}")

    def bus_tls(self) -> MeshTlsConfig:
        """What connections to NATS are secured with."""
        return self.nats.tls if self.nats.url else self.tls

    def kvbm_socket(self) -> str | None:
        """Path where this node's engines and store meet; None without a store."""
        return (self.kvbm.socket or str(self.home / "kvbm.sock")) if self.kvbm.enabled else None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file's values arrive as init arguments; the environment stands above them.
        return env_settings, init_settings


class _Resolved(Config):
    """A configuration whose values are final: the environment was read before flags were laid over it."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def default_home() -> Path:
    """`.kvmesh` of the checkout this runs from, else of the user's home directory."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "docker-compose.yml").is_file() and (parent / "proto" / "kvmesh").is_dir():
            return parent / ".kvmesh"
    return Path.home() / ".kvmesh"


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmesh"


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read the file (if any), the environment and `overrides` (nested like the file; they win over both).

    Raises KvmeshError(INVALID_ARGUMENT) that names every bad key, its place and the nearest known key.
    """
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise invalid(f"cannot read configuration {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise invalid(
                f"configuration {path} is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
        except yaml.YAMLError as error:
            raise invalid(f"configuration {path} is not valid YAML: {error}") from None
        if not isinstance(data, dict):
            raise invalid(f"configuration {path} must be a mapping, e.g. `router: {{policy: kv}}`")
    check_sections(os.environ, Config)
    try:
        config = Config(**data)
        if overrides:
            config = _Resolved(**_merge(config.model_dump(), overrides))
    except SettingsError as error:
        # Only the environment holds text that may fail to parse.
        raise invalid(f"environment: {error}; lists and whole sections are given as JSON") from None
    except ValidationError as error:
        raise invalid(f"configuration {path or ''}: ".replace(" :", ":") + explain(error, Config)) from None
    return config


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


__all__ = ["Config", "KvmeshError", "Listen", "load_config"]
