"""`kvmesh keys`: who may ask. Keys are in a bucket that all frontends follow; their text is nowhere."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmesh.cli.bus import with_bucket
from kvmesh.cli.options import ConfigFile
from kvmesh.cli.settings import running_config
from kvmesh.cli.tables import print_whole
from kvmesh.common.buckets import read_all
from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.tenants.contract import Key, Secret, digest_of, issue
from kvmesh.v1.errors_pb2 import ErrorCode

app = typer.Typer(no_args_is_help=True, help="Make, list, change, revoke and rotate API keys.")

_T = TypeVar("_T")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it, or the key's beginning.")]


def _limit(words: str, *names: str) -> Any:
    return typer.Option(*names, metavar="N", min=0, help=f"{words}; 0: no limit.")


_RPM = _limit("Requests a minute", "--rpm", "--requests-per-minute")
_TPM = _limit("Prompt and output tokens a minute", "--tpm", "--tokens-per-minute")
_CONCURRENCY = _limit("Requests at once", "--concurrency")
_MONTHLY = _limit("Prompt and output tokens a calendar month, UTC", "--monthly-tokens", "--tokens-per-month")


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose it is; a tenant's keys share its cache and its usage.")],
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model it may ask; repeatable. Default: all."),
    ] = None,
    priority: Annotated[int, typer.Option(min=-10, max=10, help="Of its requests; larger is sooner.")] = 0,
    rpm: Annotated[int, _RPM] = 0,
    tpm: Annotated[int, _TPM] = 0,
    concurrency: Annotated[int, _CONCURRENCY] = 0,
    monthly_tokens: Annotated[int, _MONTHLY] = 0,
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="30d, 12h, or 2030-01-31; without it, never.")
    ] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept.

    Frontends know it at once. Whether they ask for keys at all is `tenants.keys` in the configuration.

    \b
    Examples:
      kvmesh keys create --tenant acme
      KEY=$(kvmesh keys create --tenant acme --rpm 600 --tpm 200000 --concurrency 16)
    """
    now = time.time()
    key_id, text = issue()
    key = _checked(
        id=key_id,
        tenant=tenant,
        name=name,
        secrets=[{"sha256": digest_of(text)}],
        models=model or (),
        priority=priority,
        requests_per_minute=rpm,
        tokens_per_minute=tpm,
        concurrency=concurrency,
        tokens_per_month=monthly_tokens,
        created=now,
        expires=_moment(expires, now) if expires else 0.0,
    )

    async def put(bucket: KeyValue) -> None:
        await bucket.create(key.id, key.model_dump_json().encode())

    settings = running_config(config)
    _run(settings, put)
    _show_once(key, text, as_json)
    if settings.tenants.keys == "off":
        _note("requests need no key yet: set `tenants.keys` to `required` in the configuration")


@app.command(name="list")
def list_keys(
    config: ConfigFile = None,
    everything: Annotated[bool, typer.Option("--all", help="Revoked and expired ones, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the keys of the bucket: what they allow, never their text.

    \b
    Example:
      kvmesh keys list --json | jq -r '.[] | select(.tenant == "acme") | .id'
    """
    now = time.time()
    values = _run(running_config(config), read_all)
    keys = sorted(
        (key for key in map(_decoded, values.values()) if key and (everything or key.live(now))),
        key=lambda key: (key.tenant, key.created),
    )
    if as_json:
        print(json.dumps([_document(key, now) for key in keys], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("id", "tenant", "name", "models", "priority", "limits", "created", "state"):
        table.add_column(title)
    for key in keys:
        row = (key.id, key.tenant, key.name, ", ".join(key.models) or "all", str(key.priority), _limits(key))
        table.add_row(*map(escape, row), _day(key.created), _state(key, now))
    print_whole(table)


@app.command()
def update(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model it may ask; repeatable. Others no more."),
    ] = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="It may ask every model.")] = False,
    priority: Annotated[int | None, typer.Option(min=-10, max=10, help="Of its requests.")] = None,
    rpm: Annotated[int | None, _RPM] = None,
    tpm: Annotated[int | None, _TPM] = None,
    concurrency: Annotated[int | None, _CONCURRENCY] = None,
    monthly_tokens: Annotated[int | None, _MONTHLY] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="30d, 12h, 2030-01-31, or never.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key allows; what is not named stays, its text and its tenant always do.

    Frontends go by it at once, also for what has been used already.

    \b
    Example:
      kvmesh keys update 3f9a1c2b7d04 --requests-per-minute 1200 --expires 90d
    """
    if model and all_models:
        raise invalid("--model and --all-models exclude each other")
    now = time.time()
    wanted = {
        "name": name,
        "models": () if all_models else tuple(model) if model else None,
        "priority": priority,
        "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "concurrency": concurrency,
        "tokens_per_month": monthly_tokens,
        "expires": None if expires is None else 0.0 if expires == "never" else _moment(expires, now),
    }
    changes = {field: value for field, value in wanted.items() if value is not None}
    if not changes:
        raise invalid("nothing is to be changed; see `kvmesh keys update --help`")

    def renew(key: Key) -> Key:
        if key.revoked:
            raise invalid(f"key {key.id} was revoked; make a new one")
        return _checked(**{**key.model_dump(), **changes})

    key = _change(running_config(config), key_id, renew)
    if as_json:
        print(json.dumps(_document(key, now), indent=2))
    else:
        _note(f"key {key.id} of tenant {key.tenant}: {_limits(key)}")


@app.command()
def revoke(key_id: KeyId, config: ConfigFile = None) -> None:
    """Close a key for good; frontends refuse it at once, requests it has running go on.

    \b
    Example:
      kvmesh keys revoke 3f9a1c2b7d04
    """
    now = time.time()

    def close(key: Key) -> Key:
        return key.model_copy(update={"revoked": key.revoked or now})

    key = _change(running_config(config), key_id, close)
    _note(f"revoked {key.id} of tenant {key.tenant}")


@app.command()
def rotate(
    key_id: KeyId,
    overlap: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long the old text still opens, e.g. 1h. Default: no more."),
    ] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a key a new text and print it, this once; id, tenant, limits and usage stay.

    \b
    Example:
      KEY=$(kvmesh keys rotate 3f9a1c2b7d04 --overlap 1h)
    """
    now = time.time()
    until = _moment(overlap, now) if overlap else 0.0
    texts: list[str] = []

    def renew(key: Key) -> Key:
        if not key.live(now):
            raise invalid(f"key {key.id} was revoked or has expired; make a new one")
        _, text = issue(key.id)
        texts.append(text)
        old = [
            Secret(sha256=secret.sha256, until=min(secret.until or until, until))
            for secret in key.secrets
            if until and (not secret.until or secret.until > now)
        ]
        return key.model_copy(update={"secrets": (Secret(sha256=digest_of(text)), *old)})

    key = _change(running_config(config), key_id, renew)
    _show_once(key, texts[-1], as_json)


def _change(config: Config, key_id: str, change: Callable[[Key], Key]) -> Key:
    """Replace a key by what `change` makes of it; asked again where another change came between."""
    # The whole text, pasted, names its key, too.
    match = re.match(r"sk-km-([0-9a-f]{12})(-|$)", key_id)
    wanted = match[1] if match else key_id

    async def replace(bucket: KeyValue) -> Key:
        while True:
            try:
                entry = await bucket.get(wanted)
            except KeyNotFoundError:
                entry = None
            key = _decoded(entry.value or b"") if entry is not None else None
            if entry is None or key is None:
                raise KvmeshError(
                    ErrorCode.ERROR_CODE_NOT_FOUND, f"there is no key {wanted}; see `kvmesh keys list --all`"
                )
            changed = change(key)
            try:
                await bucket.update(wanted, changed.model_dump_json().encode(), last=entry.revision)
            except KeyWrongLastSequenceError:
                continue
            return changed

    return _run(config, replace)


def _run(config: Config, work: Callable[[KeyValue], Awaitable[_T]]) -> _T:
    return asyncio.run(with_bucket(config, config.tenants.keys_bucket, work))


def _checked(**fields: Any) -> Key:
    try:
        return Key(**fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise invalid(f"{first['loc'][0]}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _decoded(value: bytes) -> Key | None:
    try:
        return Key.model_validate_json(value)
    except ValidationError:
        return None


def _show_once(key: Key, text: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_document(key, time.time()) | {"key": text}, indent=2))
        return
    print(text)
    _note(f"key {key.id} of tenant {key.tenant}, {_limits(key)}; it is not shown again")


def _document(key: Key, now: float) -> dict[str, Any]:
    return key.model_dump(exclude={"secrets"}) | {"state": _state(key, now)}


def _limits(key: Key) -> str:
    limits = key.limits
    words = ((limits.requests, "requests/min"), (limits.tokens, "tokens/min"))
    words += ((limits.concurrency, "at once"), (limits.month, "tokens/month"))
    return ", ".join(f"{limit:,} {what}" for limit, what in words if limit) or "no limits"


def _state(key: Key, now: float) -> str:
    if key.revoked:
        return "revoked"
    return "live" if key.live(now) else "expired"


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M") if moment else ""


def _moment(text: str, now: float) -> float:
    """Unix time of `text`: so long from now, or a date."""
    if (seconds := seconds_of(text)) is not None:
        return now + seconds
    return date_of(text)


def seconds_of(text: str) -> float | None:
    """The length of 90s, 30m, 12h, 7d or 2w; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    units = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
    return float(match[1]) * units[match[2]] if match else None


def date_of(text: str) -> float:
    """Unix time of an ISO date or time, UTC where it says nothing. Raises KvmeshError(INVALID_ARGUMENT)."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise invalid(
            f"{text!r} is neither a length (90s, 30m, 12h, 7d) nor a date (2030-01-31, 2030-01-31T12:00)"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _note(text: str) -> None:
    Console(stderr=True, highlight=False).print(escape(text), soft_wrap=True)
