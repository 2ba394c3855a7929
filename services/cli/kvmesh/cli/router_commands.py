"""`kvmesh router`: why requests went where they went, what was learned, and what holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, cast

import grpc
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmesh.cli.options import ConfigFile
from kvmesh.cli.routers import router_addresses
from kvmesh.cli.settings import mesh_channels, running_config
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.client import Channels
from kvmesh.core import TERMS
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import (
    Candidate,
    ConfigureRequest,
    Decision,
    ExplainRequest,
    ExplainResponse,
    GetRatesRequest,
    ModelRates,
    PolicyNames,
    ShadowChoice,
)
from kvmesh.v1.router_pb2_grpc import RouterServiceStub

DEADLINE_S = 5.0
# A router that does not answer; its replicas may.
_AWAY = (ErrorCode.ERROR_CODE_UNAVAILABLE, ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED)

app = typer.Typer(no_args_is_help=True, help="Ask the routers why, and change what holds.")

_T = TypeVar("_T")

Routers = Annotated[
    list[str] | None,
    typer.Option("--router", metavar="HOST:PORT", help="A router; may be repeated. Default: the mesh's own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="As the answer's `id`, or the log.")
    ],
    router: Routers = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show every candidate of a request's placement, and its cost by term, in milliseconds.

    The router keeps the latest requests only (`router.explained_requests`).

    \b
    Examples:
      kvmesh router explain req_0123abcd
      kvmesh router explain req_0123abcd --json | jq '.[].winner.terms'
    """

    async def ask(stub: RouterServiceStub, _: str) -> ExplainResponse | None:
        try:
            return await stub.Explain(ExplainRequest(request_id=request_id), timeout=DEADLINE_S)
        except grpc.RpcError as error:
            problem = KvmeshError.from_rpc(error, "router")
            if problem.code != ErrorCode.ERROR_CODE_NOT_FOUND:
                raise
            return None

    answers = _run(ask, router, config)
    decisions = [decision for answer in answers if answer for decision in answer.decisions]
    if not decisions:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_NOT_FOUND,
            f"no router knows a placement of request `{request_id}`; they keep the latest only",
        )
    if as_json:
        print(json.dumps([_decision(decision) for decision in decisions], indent=2))
        return
    console = _console()
    for decision in decisions:
        _show_decision(console, decision)


@app.command()
def rates(router: Routers = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show how long work takes, as learned: per hardware class, and single workers' and links' paces.

    `error` is the mean relative error of late, each prediction judged before it was learned from.

    \b
    Example:
      kvmesh router rates --json | jq '.[].models[].classes[].laws.prefill'
    """

    async def ask(stub: RouterServiceStub, address: str) -> tuple[str, Iterable[ModelRates]]:
        return address, (await stub.GetRates(GetRatesRequest(), timeout=DEADLINE_S)).models

    answers = _run(ask, router, config)
    if as_json:
        documents = [
            {"router": address, "models": [_rates(m) for m in models]} for address, models in answers
        ]
        print(json.dumps(documents, indent=2))
        return
    console = _console()
    for address, models in answers:
        console.print(f"router {address}")
        for model in models:
            _show_rates(console, model)


@app.command(name="set")
def set_(
    key: Annotated[
        Literal["policy", "temperature", "max_waiting", "max_wait_s", "shadow"],
        typer.Argument(help="What to change."),
    ],
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="A number, a policy, or policies with commas between them.")
    ],
    router: Routers = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Change what holds in running routers, until they restart; the decision log says so, too.

    Says of every router whether it has taken the change. Exit code 1 when one has not: set it again there.

    \b
    policy        of requests that name none
    temperature   0: the lowest cost wins; more softens the choice
    max_waiting   requests of each model that wait at most; those over it are refused at once
    max_wait_s    how long requests that come from now on wait at most
    shadow        policies that look on; `none` for none

    \b
    Examples:
      kvmesh router set policy round-robin
      kvmesh router set max_waiting 200
      kvmesh router set shadow least-loaded,round-robin
    """
    request = _change(key, value)

    async def ask(stub: RouterServiceStub, address: str) -> dict[str, Any]:
        now = await stub.Configure(request, timeout=DEADLINE_S)
        return {
            "router": address,
            "policy": now.policy,
            "temperature": now.temperature,
            "max_waiting": now.max_waiting,
            "max_wait_s": now.max_wait_s,
            "shadow": list(now.shadow),
        }

    answers = asyncio.run(_ask_each(ask, router, config))
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if len(failures) == len(answers):
        raise failures[0]
    documents = [
        of.value or {"router": of.address, "error": of.failure.message if of.failure else ""}
        for of in answers
    ]
    if as_json:
        print(json.dumps(documents, indent=2))
    else:
        _show_settings(documents)
    if failures:
        raise typer.Exit(1)


def _show_settings(documents: Iterable[dict[str, Any]]) -> None:
    for document in documents:
        if "error" in document:
            Console(stderr=True, highlight=False).print(
                f"[red]router {document['router']}: not changed:[/] {escape(document['error'])}",
                soft_wrap=True,
            )
            continue
        shadow = ", ".join(document["shadow"]) or "none"
        print(
            f"router {document['router']}: policy {document['policy']}, "
            f"temperature {document['temperature']:g}, max_waiting {document['max_waiting']}, "
            f"max_wait_s {document['max_wait_s']:g}, shadow {shadow}"
        )


def _change(key: str, value: str) -> ConfigureRequest:
    if key == "policy":
        return ConfigureRequest(policy=value)
    if key == "shadow":
        names = [name.strip() for name in value.split(",") if name.strip() not in ("", "none")]
        return ConfigureRequest(shadow=PolicyNames(names=names))
    try:
        if key == "max_waiting":
            return ConfigureRequest(max_waiting=int(value))
        number = float(value)
    except ValueError:
        kind = "a whole number from 0 on" if key == "max_waiting" else "a number"
        raise invalid(f"{key} is {kind}, not `{value}`", param=key) from None
    return (
        ConfigureRequest(temperature=number) if key == "temperature" else ConfigureRequest(max_wait_s=number)
    )


def _show_decision(console: Console, decision: Decision) -> None:
    at = datetime.fromtimestamp(decision.at).astimezone().isoformat(timespec="milliseconds")
    actual = f"{decision.actual_ttft_ms:.1f}" if decision.actual_ttft_ms else "unknown"
    console.print(
        f"{decision.request_id}  {at}  model {decision.model}  policy {decision.policy}  "
        f"{decision.prompt_tokens:,} prompt tokens, held {decision.held_ms:.1f} ms; "
        f"first token predicted after {decision.predicted_ttft_ms:.1f} ms, was {actual}",
        soft_wrap=True,
    )
    table = _table("", "prefill", "decode", "cost", whole=4)
    table.add_column("terms, ms", overflow="fold")
    table.add_column("cached", overflow="fold")
    found = decision.candidates or [decision.winner]
    winner = (decision.winner.prefill_id, decision.winner.decode_id)
    for one in sorted(found, key=lambda candidate: candidate.cost):
        table.add_row(
            "->" if (one.prefill_id, one.decode_id) == winner else "",
            one.prefill_id or "-",
            one.decode_id,
            f"{one.cost:,.1f}",
            "  ".join(f"{name} {one.terms[name]:,.1f}" for name in TERMS if one.terms[name]),
            _cached(one),
        )
    console.print(table)
    for one in decision.shadows:
        placed = f"{one.prefill_id} -> {one.decode_id}" if one.prefill_id else one.decode_id
        same = (one.prefill_id, one.decode_id) == winner
        console.print(
            f"{one.policy} would have chosen {'the same' if same else placed}: cost {one.cost:,.1f} against "
            f"{one.live_cost:,.1f}, first token after {one.ttft_ms:,.1f} against {one.live_ttft_ms:,.1f} ms",
            soft_wrap=True,
        )


def _show_rates(console: Console, model: ModelRates) -> None:
    console.print(
        f"model {model.model}: {model.predictions:,} prompts predicted, off by {model.error_ms:.1f} ms of "
        f"{model.actual_ms:.1f} (bias {model.bias_ms:+.1f})",
        soft_wrap=True,
    )
    table = _table("class", "workers", "law", "milliseconds", "observed", "error")
    for of in model.classes:
        for law in of.laws:
            terms = "  ".join(f"{name} {ms:.3g}" for name, ms in law.coefficients.items())
            error = f"{law.error:.0%}" if law.observations else "-"
            table.add_row(of.hardware_class, str(of.workers), law.name, terms, f"{law.observations:,}", error)
    console.print(table)
    paces = _table("worker", "class", "pace", "observed", "error")
    for one in model.workers:
        error = f"{one.error:.0%}" if one.observations else "-"
        paces.add_row(
            one.worker_id, one.hardware_class, f"x{one.slowness:.2f}", f"{one.observations:,}", error
        )
    console.print(paces)
    if model.links:
        links = _table("from", "to", "link", "observed", "error")
        for link in model.links:
            links.add_row(
                link.prefill_id,
                link.decode_id,
                f"x{link.slowness:.2f}",
                f"{link.observations:,}",
                f"{link.error:.0%}",
            )
        console.print(links)


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "request_id": decision.request_id,
        "model": decision.model,
        "policy": decision.policy,
        "at": decision.at,
        "held_ms": decision.held_ms,
        "prompt_tokens": decision.prompt_tokens,
        "predicted_ttft_ms": decision.predicted_ttft_ms,
        "actual_ttft_ms": decision.actual_ttft_ms or None,
        "winner": _candidate(decision.winner),
        "candidates": [_candidate(candidate) for candidate in decision.candidates],
        "shadows": [_shadow(choice) for choice in decision.shadows],
    }


def _shadow(choice: ShadowChoice) -> dict[str, Any]:
    return {
        "policy": choice.policy,
        "prefill": choice.prefill_id or None,
        "decode": choice.decode_id,
        "cost": choice.cost,
        "ttft_ms": choice.ttft_ms,
        "live_cost": choice.live_cost,
        "live_ttft_ms": choice.live_ttft_ms,
        "regret_ms": choice.live_cost - choice.cost,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "prefill": candidate.prefill_id or None,
        "decode": candidate.decode_id,
        "cost": candidate.cost,
        "terms": {name: candidate.terms[name] for name in TERMS},
        "cached_tokens": {
            tier: getattr(candidate.cached, tier) for tier in ("device", "host", "nvme", "network")
        },
    }


def _rates(model: ModelRates) -> dict[str, Any]:
    return {
        "model": model.model,
        "predictions": model.predictions,
        "bias_ms": model.bias_ms,
        "error_ms": model.error_ms,
        "actual_ms": model.actual_ms,
        "classes": [
            {
                "class": of.hardware_class,
                "workers": of.workers,
                "laws": {
                    law.name: {
                        "ms": dict(law.coefficients),
                        "observations": law.observations,
                        "error": law.error,
                    }
                    for law in of.laws
                },
            }
            for of in model.classes
        ],
        "workers": [
            {
                "id": one.worker_id,
                "class": one.hardware_class,
                "slowness": one.slowness,
                "observations": one.observations,
                "error": one.error,
            }
            for one in model.workers
        ],
        "links": [
            {
                "prefill": link.prefill_id,
                "decode": link.decode_id,
                "slowness": link.slowness,
                "observations": link.observations,
                "error": link.error,
            }
            for link in model.links
        ],
    }


def _cached(candidate: Candidate) -> str:
    tiers = ((tier, getattr(candidate.cached, tier)) for tier in ("device", "host", "nvme", "network"))
    return "  ".join(f"{tier} {tokens:,}" for tier, tokens in tiers if tokens) or "-"


class _Answer(NamedTuple, Generic[_T]):
    """What one router said: either has a value."""

    address: str
    value: _T | None
    failure: KvmeshError | None


async def _ask_each(
    ask: Callable[[RouterServiceStub, str], Awaitable[_T]], routers: list[str] | None, file: Path | None
) -> list[_Answer[_T]]:
    """All routers at once; those named, or those of the mesh."""

    async def one(channels: Channels, address: str) -> _Answer[_T]:
        try:
            return _Answer(address, await ask(RouterServiceStub(channels.get(address)), address), None)
        except grpc.RpcError as error:
            return _Answer(address, None, KvmeshError.from_rpc(error, f"router {address}"))

    channels = mesh_channels(file)
    try:
        addresses = routers or await router_addresses(running_config(file))
        return await asyncio.gather(*(one(channels, address) for address in addresses))
    finally:
        await channels.close()


def _run(
    ask: Callable[[RouterServiceStub, str], Awaitable[_T]], routers: list[str] | None, file: Path | None
) -> list[_T]:
    """What the routers answer; says which do not. Raises KvmeshError where one refuses, or none answers."""
    answers = asyncio.run(_ask_each(ask, routers, file))
    failures = [answer.failure for answer in answers if answer.failure is not None]
    refusals = [failure for failure in failures if failure.code not in _AWAY]
    if refusals or len(failures) == len(answers):
        raise (refusals or failures)[0]
    for failure in failures:
        Console(stderr=True, highlight=False).print(f"[yellow]warning:[/] {escape(failure.message)}")
    return [cast("_T", answer.value) for answer in answers if answer.failure is None]


def _table(*columns: str, whole: int = 0) -> Table:
    """The first `whole` columns are never cut."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place < whole)
    return table


def _console() -> Console:
    return Console(highlight=False)
