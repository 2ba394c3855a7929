"""`kvmesh kvbm`: what a node's KV store has, whether it is sound, and where its blocks are to be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import grpc
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.cli.index_audit import Audit, Comparison, Result, tier_name
from kvmesh.cli.options import ConfigFile
from kvmesh.cli.routers import router_addresses
from kvmesh.cli.settings import mesh_channels, running_config
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.columns import STORE_TIERS
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.kvbm_pb2 import (
    FlushRequest,
    GetStatsRequest,
    GetStatsResponse,
    PersistRequest,
    VerifyRequest,
    WarmRequest,
)
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

# A store that has no answer for so long is not there.
DEADLINE_S = 5.0
# What may take as long as a disk does.
LONG_S = 3600.0
MIB = 1 << 20

app = typer.Typer(no_args_is_help=True, help="Look into the KV store of a node, and verify it.")

_T = TypeVar("_T")


class TierName(StrEnum):
    HOST = "host"
    NVME = "nvme"
    NETWORK = "network"

    @property
    def tier(self) -> Tier:
        return next(tier for tier, name in STORE_TIERS.items() if name == self.value)


Store = Annotated[
    str | None, typer.Option("--store", metavar="HOST:PORT", help="A store. Default: the mesh's own.")
]
OneTier = Annotated[TierName | None, typer.Option("--tier", help="One tier. Default: all.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@app.command()
def stats(store: Store = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show what each tier holds and what it has done.

    \b
    Example:
      kvmesh kvbm stats --json | jq '.tiers[] | {tier, blocks, corrupt}'
    """

    async def ask(stub: KvbmServiceStub) -> dict[str, Any]:
        return _document(await stub.GetStats(GetStatsRequest(), timeout=DEADLINE_S))

    document = _run(ask, store, config)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    console = _console()
    console.print(
        f"store {document['id']} on {document['node']}  engines {document['engines']}  "
        f"eviction {document['eviction']}  pinned {document['pinned_bytes'] / MIB:,.0f} MiB",
        soft_wrap=True,
    )
    table = _table("tier", "blocks", "in use", "used", "of", "stored", "loaded", "hits", "corrupt", "checked")
    for tier in document["tiers"]:
        hits = f"{tier['hits']:,} of {tier['lookups']:,}"
        table.add_row(
            tier["tier"],
            f"{tier['blocks']:,}",
            f"{tier['blocks_in_use']:,}",
            f"{tier['used_bytes'] / MIB:,.0f} MiB",
            f"{tier['capacity_bytes'] / MIB:,.0f} MiB",
            f"{tier['stored']:,}",
            f"{tier['loaded']:,}",
            hits,
            f"{tier['corrupt']:,}",
            f"{tier['scrubbed']:,}",
        )
    console.print(table)
    if (network := document["network"])["fetched"] or network["failed"] or network["lent"]:
        failed = "  ".join(f"{reason} {blocks:,}" for reason, blocks in sorted(network["failed"].items()))
        console.print(
            f"network  fetched {network['fetched']:,}  lent {network['lent']:,}  not had: {failed or 'none'}",
            soft_wrap=True,
        )
    if (nvme := document["nvme"]) and nvme["problem"]:
        console.print(f"nvme is out: {nvme['problem']}", style="red", soft_wrap=True)
    if objects := document["objects"]:
        missed = "  ".join(
            f"{reason} {blocks:,}" for reason, blocks in sorted(objects["missed"].items()) if blocks
        )
        console.print(
            f"{objects['url']}  written {objects['written']:,}  waiting {objects['waiting']:,}  "
            f"recalled {objects['recalled']:,}  not had: {missed or 'none'}",
            soft_wrap=True,
        )
        if objects["problem"]:
            console.print(f"object storage is out: {objects['problem']}", style="red", soft_wrap=True)


@app.command()
def verify(
    store: Store = None,
    tier: OneTier = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--router", metavar="HOST:PORT", help="Whose index to compare. Default: the mesh's own."
        ),
    ] = None,
    index: Annotated[
        bool, typer.Option("--index/--no-index", help="Compare the router's index with the store, too.")
    ] = True,
    mib_per_s: Annotated[int, typer.Option(min=0, help="How fast to read; 0: as fast as it goes.")] = 0,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Check every block at rest, and the router's index against the store; exit with 1 on a difference.

    Works while the mesh serves. Bad blocks are dropped as they are found.

    \b
    Examples:
      kvmesh kvbm verify
      kvmesh kvbm verify --tier nvme --mib-per-s 200 --json
    """
    request = VerifyRequest(
        tier=Tier.TIER_UNSPECIFIED if tier is None else tier.tier, bytes_per_s=mib_per_s * MIB
    )

    async def ask(stub: KvbmServiceStub) -> tuple[str, list[dict[str, Any]]]:
        identity = (await stub.GetStats(GetStatsRequest(), timeout=DEADLINE_S)).id
        return identity, await _verified(stub.Verify(request, timeout=LONG_S))

    identity, tiers = _run(ask, store, config)
    compared = _compare(identity, store, router, config) if index else []
    sound = all(not of["corrupt"] and not of["problem"] for of in tiers) and all(c.fine for c in compared)
    if as_json:
        document = {
            "sound": sound,
            "store": identity,
            "tiers": tiers,
            "index": [c.to_json() for c in compared],
        }
        print(json.dumps(document, indent=2))
    else:
        _show(tiers, compared)
    if not sound:
        raise typer.Exit(1)


@app.command()
def flush(
    store: Store = None, tier: OneTier = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Forget the blocks of a tier, or of all but object storage, that are not in use.

    `persist` first keeps them.

    \b
    Example:
      kvmesh kvbm persist && kvmesh kvbm flush --tier host
    """
    request = FlushRequest(tier=Tier.TIER_UNSPECIFIED if tier is None else tier.tier)

    async def ask(stub: KvbmServiceStub) -> int:
        return (await stub.Flush(request, timeout=LONG_S)).blocks

    blocks = _run(ask, store, config)
    print(json.dumps({"blocks": blocks}) if as_json else f"{blocks:,} blocks forgotten")


@app.command()
def persist(store: Store = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Write what memory alone has to the disk and to object storage, so that it outlives the machine."""

    async def ask(stub: KvbmServiceStub) -> None:
        await stub.Persist(PersistRequest(), timeout=LONG_S)

    _run(ask, store, config)
    print(json.dumps({"persisted": True}) if as_json else "all blocks are kept")


@app.command()
def warm(
    model: Annotated[str, typer.Argument(help="Whose blocks. Default: all models'.")] = "",
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="URL|HOST:PORT",
            help="Object storage (s3://bucket/prefix, fs:///path) or another store. Default: the disk.",
        ),
    ] = "",
    store: Store = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Read blocks into vacant memory, those used last, before anybody asks for them.

    They come from the store's disk, from object storage, which is reached as the store reaches its own, or
    from another store. Nothing leaves memory for them. Exit 1 if some should have come and did not.

    \b
    Examples:
      kvmesh kvbm warm smollm2-135m-instruct
      kvmesh kvbm warm --from s3://kv/cluster-1
      kvmesh kvbm warm --from 10.0.0.7:8200
    """

    async def ask(stub: KvbmServiceStub) -> dict[str, int]:
        total = {"brought": 0, "failed": 0, "left": 0}
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("warming", total=None)
            async for step in stub.Warm(WarmRequest(model=model, source=source), timeout=LONG_S):
                total["brought"] += step.brought
                total["failed"] += step.failed
                total["left"] = step.left
                done = total["brought"] + total["failed"]
                progress.update(bar, completed=done, total=done + step.to_come)
        return total

    total = _run(ask, store, config)
    if as_json:
        print(json.dumps(total))
    else:
        print(
            f"{total['brought']:,} blocks brought, {total['failed']:,} failed, "
            f"{total['left']:,} left where they are"
        )
    if total["failed"]:
        raise typer.Exit(1)


async def _verified(answers: AsyncIterator[Any]) -> list[dict[str, Any]]:
    """Each tier's answers in one."""
    tiers: dict[str, dict[str, Any]] = {}
    async for answer in answers:
        name = tier_name(answer.tier)
        new = {"tier": name, "blocks": 0, "bytes": 0, "corrupt": [], "problem": ""}
        of = tiers.setdefault(name, new)
        of["blocks"] += answer.blocks
        of["bytes"] += answer.bytes
        of["corrupt"] += [{"tier": tier_name(bad.tier), "digest": bad.digest.hex()} for bad in answer.corrupt]
        of["problem"] = answer.problem
    return list(tiers.values())


def _compare(identity: str, store: str | None, router: str | None, file: Path | None) -> list[Comparison]:
    async def itself() -> dict[str, str]:
        return {identity: _address(store, file)}

    async def run() -> list[Comparison]:
        address = router or (await router_addresses(running_config(file)))[0]
        channels = mesh_channels(file)
        try:
            return await Audit(channels, itself).verify([address], identity)
        except KvmeshError as error:
            # What was found of the blocks is told all the same.
            return [Comparison(address, identity, Result.UNREACHABLE, error=error.message)]
        finally:
            await channels.close()

    return asyncio.run(run())


def _document(answer: GetStatsResponse) -> dict[str, Any]:
    nvme = answer.nvme if answer.HasField("nvme") else None
    objects = answer.objects if answer.HasField("objects") else None
    return {
        "id": answer.id,
        "node": answer.node,
        "engines": answer.engines,
        "eviction": answer.eviction,
        "pins": answer.pins,
        "pinned_bytes": answer.pinned_bytes,
        "tiers": [
            {"tier": tier_name(tier.tier)}
            | {_plain(name): value for name, value in _numbers(tier).items()}
            | {"evicted": dict(tier.evicted)}
            for tier in answer.tiers
        ],
        "network": {
            "fetched": answer.network.fetched_total,
            "fetched_bytes": answer.network.fetched_bytes_total,
            "failed": dict(answer.network.failed),
            "lent": answer.network.lent_total,
            "lending": answer.network.lent,
            "bytes_per_s": dict(answer.network.bytes_per_s),
        },
        "nvme": None
        if nvme is None
        else {"problem": nvme.problem, "io": nvme.io}
        | {_plain(name): value for name, value in _numbers(nvme).items()},
        "objects": None
        if objects is None
        else {"url": objects.url, "problem": objects.problem}
        | {"skipped": dict(objects.skipped), "missed": dict(objects.missed)}
        | {_plain(name): value for name, value in _numbers(objects).items()},
    }


def _numbers(message: Any) -> dict[str, int]:
    fields = message.DESCRIPTOR.fields
    return {f.name: getattr(message, f.name) for f in fields if f.cpp_type == f.CPPTYPE_UINT64}


def _plain(name: str) -> str:
    return name.removesuffix("_total")


def _show(tiers: list[dict[str, Any]], compared: list[Comparison]) -> None:
    console = _console()
    table = _table("tier", "blocks", "bytes", "corrupt", "")
    for of in tiers:
        table.add_row(
            of["tier"], f"{of['blocks']:,}", f"{of['bytes']:,}", f"{len(of['corrupt']):,}", of["problem"]
        )
    console.print(table)
    for of in tiers:
        for bad in of["corrupt"]:
            console.print(f"dropped from {bad['tier']}: {bad['digest']}", style="red", soft_wrap=True)
    for found in compared:
        blocks = "  ".join(
            f"{what} {len(hashes):,} {tier}: {' '.join(hashes)}"
            for what, by_tier in (("missing", found.missing), ("extra", found.extra))
            for tier, hashes in by_tier.items()
        )
        console.print(
            f"index of {found.router}: {found.result}  {found.error or blocks}",
            style="green" if found.fine else "red",
            soft_wrap=True,
        )


def _run(
    ask: Callable[[KvbmServiceStub], Coroutine[Any, Any, _T]], store: str | None, file: Path | None
) -> _T:
    """Raises KvmeshError for what the store says, or when it is not there."""

    async def run() -> _T:
        channels = mesh_channels(file)
        try:
            return await ask(KvbmServiceStub(channels.get(_address(store, file))))
        except grpc.aio.AioRpcError as error:
            raise KvmeshError.from_rpc(error, "kvbm") from None
        finally:
            await channels.close()

    return asyncio.run(run())


def _address(store: str | None, file: Path | None) -> str:
    """Of the named store, or of the mesh's own."""
    if store is not None:
        return store
    kvbm = running_config(file).kvbm
    return f"{kvbm.advertised_host()}:{kvbm.port}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False)
