"""`kvmesh router replay`: the decisions of a log made again, and what other policies would have chosen."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cli.router_commands import AsJson, app
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.core import replay as replay_log
from kvmesh.v1.errors_pb2 import ErrorCode

# Exit code when a decision came out otherwise than it is logged.
DIFFERS = 4

Rates = dict[str, dict[str, dict[str, float]]]


@app.command()
def replay(
    log: Annotated[
        Path, typer.Argument(metavar="LOG", help="A directory as in `router.decision_log.path`, or one file.")
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Ask this policy at every decision, too.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Judge by these rates: `kvmesh router rates --json`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a log's decisions again, and compare; show what another policy, or other rates, would have chosen.

    The other policy is asked in the state that the logged placements led to. `regret` is the predicted cost,
    in milliseconds, that its choice would have saved. Exits with 4 when a decision comes out otherwise.

    \b
    Examples:
      kvmesh router replay decisions/
      kvmesh router replay decisions/ --policy least-loaded
      kvmesh router rates --json > rates.json; kvmesh router replay decisions/ --rates rates.json
    """
    given = _rates(rates) if rates is not None else None
    try:
        reports: list[dict[str, Any]] = json.loads(replay_log(log, policy=policy, rates=given))
    except FileNotFoundError as error:
        raise KvmeshError(ErrorCode.ERROR_CODE_NOT_FOUND, str(error)) from None
    except (OSError, ValueError) as error:
        raise invalid(str(error)) from None
    if as_json:
        print(json.dumps(reports, indent=2))
    else:
        console = Console(highlight=False)
        for report in reports:
            _show(console, report)
    if any(report["differences"] for report in reports):
        raise typer.Exit(DIFFERS)


def _rates(path: Path) -> Rates:
    """Coefficients by hardware class and law. Raises KvmeshError(INVALID_ARGUMENT)."""
    try:
        routers = json.loads(path.read_text())
        rates: Rates = {
            of["class"]: {
                law: {name: float(ms) for name, ms in said["ms"].items()} for law, said in of["laws"].items()
            }
            for router in routers
            for model in router["models"]
            for of in model["classes"]
        }
    except OSError as error:
        raise invalid(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise invalid(f"{path} is not what `kvmesh router rates --json` prints") from None
    every = [ms for laws in rates.values() for law in laws.values() for ms in law.values()]
    if not all(math.isfinite(ms) and ms >= 0 for ms in every):
        raise invalid(f"{path} has a rate that is not a number from 0 on")
    return rates


def _show(console: Console, report: dict[str, Any]) -> None:
    console.print(
        f"{report['model']}: {report['same']:,} of {report['decisions']:,} decisions came out the same; "
        f"{report['refusals']:,} refusals; {report['calls']:,} calls in {report['files']:,} files, "
        f"{report['missing']:,} missing, {report['skipped']:,} skipped",
        soft_wrap=True,
    )
    for one in report["differences"]:
        console.print(f"  {one['file']}:{one['line']}", soft_wrap=True)
        console.print(f"    logged    {one['logged']}", soft_wrap=True)
        console.print(f"    replayed  {one['replayed']}", soft_wrap=True)
    for at, changes in report["changes"]:
        when = datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")
        made = ", ".join(f"{k} {v}" for k, v in changes.items() if k != "by" and v is not None)
        console.print(f"  {when}  {changes['by'] or 'unknown'} set {made}", soft_wrap=True)
    if not report["others"]:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("policy", "decisions", "differ", "better", "cost", "was", "ttft", "was", "regret", "p95"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for other in report["others"]:
        figures = ("cost_ms", "chosen_cost_ms", "ttft_ms", "chosen_ttft_ms", "regret_ms", "regret_p95_ms")
        table.add_row(
            other["policy"],
            *(f"{other[name]:,}" for name in ("decisions", "differ", "better")),
            *(f"{other[name]:,.1f}" for name in figures),
        )
    console.print(table)
