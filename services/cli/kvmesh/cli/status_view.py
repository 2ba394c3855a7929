"""The status document as tables for people."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "unready": "yellow",
    "draining": "yellow",
    "degraded": "yellow",
    "stopping": "yellow",
    "restarting": "red",
    "unreachable": "red",
    "failed": "red",
}


def render(document: dict[str, Any]) -> RenderableType:
    """A heading, the processes, the workers, the stores and the router in a line each."""
    parts: list[RenderableType] = [_heading(document["mesh"]), Text(), _processes(document["processes"])]
    if deaths := _deaths(document["processes"]):
        parts += [Text(), *deaths]
    if document["workers"]:
        parts += [Text(), _workers(document["workers"])]
    if any(store["tiers"] for store in document["kvbm"]):
        parts += [Text(), _tiers(document["kvbm"])]
    parts += [Text(), *_lines(document)]
    return Group(*parts)


def _heading(mesh: dict[str, Any]) -> Text:
    text = Text(mesh["model"], style="bold")
    text.append(f" at {mesh['url']}/v1  ", style="not bold")
    text.append(mesh["state"], style=f"not bold {_COLOURS.get(mesh['state'], '')}")
    text.append(f"  up {_age(mesh['started_at'])}", style="not bold dim")
    return text


def _processes(processes: list[dict[str, Any]]) -> Table:
    table = _table("process", "state", "pid", "address", "restarts")
    for process in processes:
        table.add_row(
            process["name"],
            _state(process["state"]),
            str(process["pid"] or ""),
            process["address"],
            str(process["restarts"] or ""),
        )
    return table


def _deaths(processes: list[dict[str, Any]]) -> list[Text]:
    return [
        _line(process["name"], f"died {_age(process['last_exit_at'])} ago: {process['last_exit']}", "red")
        for process in processes
        if process["last_exit"]
    ]


def _workers(workers: list[dict[str, Any]]) -> Table:
    # The heading names the one model there is; of several, each worker's says more than its engine.
    what = "model" if len({worker.get("model") for worker in workers}) > 1 else "engine"
    table = _table("worker", "role", what, "state", "requests", "blocks", "cached", "of")
    # So that a terminal of 80 columns has room for the rest.
    table.columns[2].max_width = 16
    for column in table.columns[4:]:
        column.justify = "right"
    for worker in workers:
        state = _state(worker["state"])
        if not worker["routed"] and worker["state"] == "ready":
            state.append(", unrouted", style="yellow")
        counts = ("requests", "blocks_used", "blocks_cached", "blocks_total")
        table.add_row(
            worker.get("id", "?"),
            worker.get("role", ""),
            worker.get(what, ""),
            state,
            *(f"{worker[key]:,}" if key in worker else "" for key in counts),
        )
    return table


def _tiers(stores: list[dict[str, Any]]) -> Table:
    table = _table("store", "tier", "used", "capacity", "blocks", "stored", "loaded", "evicted", "hits")
    for column in table.columns[2:]:
        column.justify = "right"
    for store in stores:
        for tier in store["tiers"]:
            lookups = tier["lookups_total"]
            table.add_row(
                store["id"],
                tier["tier"],
                _bytes(tier["used_bytes"]),
                _bytes(tier["capacity_bytes"]),
                *(f"{tier[key]:,}" for key in ("blocks", "stored_total", "loaded_total", "evicted_total")),
                f"{tier['hits_total'] / lookups:.0%}" if lookups else "",
            )
    return table


def _lines(document: dict[str, Any]) -> list[Text]:
    bus = document["nats"]
    lines = [line for router in document["routers"] for line in _router(router)]
    lines += [_line(store["id"], store["error"], "red") for store in document["kvbm"] if "error" in store]
    for store in document["kvbm"]:
        if (nvme := store.get("nvme")) and nvme["problem"]:
            lines.append(_line(store["id"], f"nvme tier is out: {nvme['problem']}", "red"))
        if (objects := store.get("objects")) and objects["problem"]:
            lines.append(_line(store["id"], f"{objects['url']} is out: {objects['problem']}", "red"))
    if bus["connected"]:
        lines.append(_line("nats", f"{bus['url']} · version {bus['version']} · {bus['rtt_ms']:.1f} ms"))
    else:
        lines.append(_line("nats", f"{bus['url']}: {bus['error']}", "red"))
    return lines


def _router(router: dict[str, Any]) -> list[Text]:
    if "error" in router:
        return [_line("router", f"{router['address']}: {router['error']}", "red")]
    index = router["index"]
    lines = [
        _line(
            "router",
            f"policy {router['policy']} · {router['leases']} leases · index: {index['blocks']:,} blocks "
            f"on {index['workers']} workers, {_bytes(index['bytes'])}",
        )
    ]
    for replica in router["replicas"]:
        state = "in step" if replica["in_sync"] else f"{replica['lag_ms'] / 1000:.1f} s behind"
        lines.append(_line("", f"hears {replica['id']}: {replica['leases']} leases of its own, {state}"))
    if not router["bus_connected"]:
        lines.append(_line("", "not connected to NATS: routing by the last known state", "yellow"))
    return lines


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _line(name: str, text: str, style: str = "") -> Text:
    line = Text(f"{name:<12} ", style="dim")
    line.append(text, style=f"not dim {style}")
    return line


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, ""))


def _age(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
