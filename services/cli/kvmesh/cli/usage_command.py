"""`kvmesh usage`: what tenants used of which model."""

from __future__ import annotations

import asyncio
import csv
import json
import sys
import time
from dataclasses import asdict, fields

from rich.markup import escape
from rich.table import Table

from kvmesh.cli.bus import with_bucket
from kvmesh.cli.key_commands import date_of, seconds_of
from kvmesh.cli.tables import print_whole
from kvmesh.common.buckets import read_all
from kvmesh.common.config import Config
from kvmesh.common.errors import invalid
from kvmesh.frontend.tenants.usage import DAY_S, Used, entries_of, sums


def usage(config: Config, tenant: str | None, since: str, *, as_csv: bool, as_json: bool) -> None:
    """Print usage by tenant and model. Raises KvmeshError: INVALID_ARGUMENT, or UNAVAILABLE without a bus."""
    if as_csv and as_json:
        raise invalid("--csv or --json, one of them")
    start = since_of(since, time.time())
    settings = config.tenants
    values = asyncio.run(
        with_bucket(config, settings.usage_bucket, read_all, max_age_s=settings.usage_days * DAY_S)
    )
    rows = [
        {"tenant": whose, "model": model, **asdict(used)}
        for (whose, model), used in sums(entries_of(values), start, tenant).items()
    ]
    columns = ["tenant", "model", *(field.name for field in fields(Used))]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="left" if column in columns[:2] else "right")
        for row in rows:
            counts = (f"{row[column]:,}" for column in columns[2:])
            table.add_row(escape(row["tenant"] or "-"), escape(row["model"]), *counts)
        print_whole(table)


def since_of(text: str, now: float) -> float:
    """Unix time from which on usage counts: so long ago, or a date; empty: everything kept."""
    if not text:
        return 0.0
    seconds = seconds_of(text)
    return now - seconds if seconds is not None else date_of(text)
