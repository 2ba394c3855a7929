"""`kvmesh index`: what the routers' indexes hold, and whether it is true."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cli.holders import registered_holders
from kvmesh.cli.index_audit import Audit, Comparison, Held, Result, tier_name
from kvmesh.cli.options import ConfigFile
from kvmesh.cli.routers import router_addresses
from kvmesh.cli.settings import mesh_channels, running_config
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import GetStateResponse

# Blocks shown of a difference; JSON has them all.
SHOWN = 5

app = typer.Typer(no_args_is_help=True, help="Look into the routers' indexes, and verify them.")

_T = TypeVar("_T")

Routers = Annotated[
    list[str] | None,
    typer.Option("--router", metavar="HOST:PORT", help="A router; may be repeated. Default: the mesh's own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@app.command()
def stats(router: Routers = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the size of each index, and how far it is with every worker and store.

    \b
    Example:
      kvmesh index stats --json | jq '.[].holders[] | select(.live | not)'
    """

    async def ask(audit: Audit, routers: list[str]) -> list[dict[str, Any]]:
        states = await asyncio.gather(*(audit.state(address) for address in routers))
        return [_stats(address, state) for address, state in zip(routers, states, strict=True)]

    documents = _run(ask, router, config)
    if as_json:
        print(json.dumps(documents, indent=2))
        return
    console = _console()
    for document in documents:
        sizes = "  ".join(f"{name} {value:,}" for name, value in document["index"].items())
        console.print(f"router {document['router']}  {sizes}", soft_wrap=True)
        table = _table("holder", "state", "batch", "blocks", "forgotten", "address")
        for holder in document["holders"]:
            blocks = "  ".join(f"{tier} {count:,}" for tier, count in holder["blocks"].items())
            state = "live" if holder["live"] else "behind"
            batch, forgotten = f"{holder['sequence']:,}", f"{holder['forgotten']:,}"
            table.add_row(holder["id"], state, batch, blocks, forgotten, holder["address"])
        console.print(table)


@app.command()
def verify(router: Routers = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Compare every router's index with what the workers and stores have; exit with 1 unless all agree.

    Works while the mesh serves. A router that is behind gets five seconds to catch up. Compared are all
    that are registered or that any of the routers knows.

    \b
    Examples:
      kvmesh index verify
      kvmesh index verify --router 10.0.0.1:8100 --router 10.0.0.2:8100 --json
    """

    async def ask(audit: Audit, routers: list[str]) -> list[Comparison]:
        return await audit.verify(routers)

    comparisons = _run(ask, router, config)
    equal = all(comparison.fine for comparison in comparisons)
    if as_json:
        print(json.dumps({"equal": equal, "comparisons": [c.to_json() for c in comparisons]}, indent=2))
    else:
        _show(comparisons)
    if not equal:
        raise typer.Exit(1)


@app.command()
def dump(
    holder: Annotated[str | None, typer.Argument(metavar="[HOLDER]", help="A worker or store.")] = None,
    router: Routers = None,
    config: ConfigFile = None,
    truth: Annotated[bool, typer.Option("--truth", help="What the holder itself has instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the blocks that an index has, one a line: holder, tier, hash.

    \b
    Examples:
      kvmesh index dump decode-0 | wc -l
      diff <(kvmesh index dump decode-0) <(kvmesh index dump decode-0 --truth)
    """

    async def ask(audit: Audit, routers: list[str]) -> dict[str, dict[str, Held]]:
        return {address: await _held(audit, address, holder, truth=truth) for address in routers}

    dumps = _run(ask, router, config)
    if as_json:
        print(
            json.dumps({address: {h: _dump(held) for h, held in of.items()} for address, of in dumps.items()})
        )
        return
    for of_router in dumps.values():
        for holder_id, held in of_router.items():
            for tier, blocks in _dump(held)["blocks"].items():
                for block in blocks:
                    print(holder_id, tier, block)


async def _held(audit: Audit, router: str, holder: str | None, *, truth: bool) -> dict[str, Held]:
    holders = {held.id: held for held in (await audit.state(router)).holders}
    if holder is not None and holder not in holders:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_NOT_FOUND,
            f"router {router} has no holder `{holder}`; it has: {', '.join(sorted(holders)) or 'none'}",
        )
    wanted = [held for held in holders.values() if holder in (None, held.id)]
    found = await asyncio.gather(
        *(audit.held((held.address or router) if truth else router, held.id) for held in wanted)
    )
    return {held.id: blocks for held, blocks in zip(wanted, found, strict=True)}


def _dump(held: Held) -> dict[str, Any]:
    blocks = {tier_name(tier): [f"{block:016x}" for block in sorted(of)] for tier, of in held.tiers.items()}
    return {"incarnation": f"{held.incarnation:x}", "sequence": held.sequence, "blocks": blocks}


def _stats(address: str, state: GetStateResponse) -> dict[str, Any]:
    index = state.index
    return {
        "router": address,
        "index": {
            "blocks": index.blocks,
            "bytes": index.bytes,
            "gaps": index.gaps_total,
            "divergences": index.divergences_total,
            "forgotten": index.forgotten_total,
        },
        "holders": [
            {
                "id": held.id,
                "live": held.live,
                "incarnation": f"{held.incarnation:x}",
                "sequence": held.sequence,
                "address": held.address,
                "blocks": {tier_name(digest.tier): digest.count for digest in held.digests},
                "forgotten": held.forgotten,
            }
            for held in state.holders
        ],
    }


def _show(comparisons: list[Comparison]) -> None:
    table = _table("router", "holder", "result", "blocks", "missing", "extra", "")
    for found in comparisons:
        colour = "green" if found.fine else "red"
        table.add_row(
            found.router,
            found.holder,
            f"[{colour}]{found.result}[/]",
            f"{found.blocks:,}",
            _some(found.missing),
            _some(found.extra),
            found.error,
        )
    console = _console()
    console.print(table)
    different = sum(found.result in (Result.DIFFERENT, Result.ABSENT) for found in comparisons)
    unsure = sum(not found.fine for found in comparisons) - different
    verdict = f"{len(comparisons)} compared, {different} different, {unsure} not comparable"
    console.print(verdict, style="red" if different or unsure else "green")


def _some(blocks: dict[str, list[str]]) -> str:
    """A few of the blocks, and how many there are."""
    lines = [
        f"{len(of):,} {tier}: {' '.join(of[:SHOWN])}{' ...' if len(of) > SHOWN else ''}"
        for tier, of in blocks.items()
    ]
    return "\n".join(lines)


def _run(
    ask: Callable[[Audit, list[str]], Coroutine[Any, Any, _T]], routers: list[str] | None, file: Path | None
) -> _T:
    async def run() -> _T:
        config, channels = running_config(file), mesh_channels(file)
        audit = Audit(channels, partial(registered_holders, config, channels))
        try:
            return await ask(audit, routers or await router_addresses(config))
        finally:
            await channels.close()

    return asyncio.run(run())


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False)
