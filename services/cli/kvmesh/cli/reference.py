"""`python -m kvmesh.cli.reference DIRECTORY`: write the pages of the reference that the code has all of."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from kvmesh.cli.config_commands import commented
from kvmesh.common import metrics
from kvmesh.common.config import Config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvmesh.cli.reference", description=__doc__)
    parser.add_argument("directory", type=Path, help="of the reference")
    directory: Path = parser.parse_args().directory
    for name, page in PAGES.items():
        (directory / name).write_text(page())


def configuration() -> str:
    """Every key with its default and meaning."""
    # Not of this machine, nor of this environment.
    names = {"node": "HOSTNAME", "home": Path(".kvmesh"), "cache_dir": Path("~/.cache/kvmesh")}
    keys = "\n".join(commented(Config.model_construct(**names)))
    return f"""# Configuration

One YAML file configures every process, under `kvmesh up` as in containers. A flag of the command line wins
over the environment, which wins over the file: `router.policy` is `KVMESH_ROUTER__POLICY` there, and lists
and whole sections are given as JSON. Unknown keys are refused with the nearest known one.

- `kvmesh config check FILE` says what is wrong before anything starts.
- `kvmesh config show` prints what holds in the end.
- `kvmesh config schema` prints a JSON Schema for editors; with `--yaml`, what follows.

Every key, at its default:

```yaml
{keys}
```
"""


def metric_page() -> str:
    """Every metric that a process exposes."""
    families = {
        "Every process": [metrics.rpc("ROLE"), metrics.bus("ROLE")],
        "Frontend": [metrics.frontend()],
        "Frontend, where keys are on": [metrics.tenants()],
        "Router": [metrics.router()],
        "Workers": [metrics.worker("ROLE")],
        "KVBM": [metrics.kvbm()],
    }
    tables = "\n".join(_table(title, parts) for title, parts in families.items())
    return f"""# Metrics

Every process serves Prometheus' format at `/metrics` on its `metrics_port`. Units are in the names; ROLE is
the process's: `frontend`, `router`, `prefill`, `decode`, `aggregated` or `kvbm`.

{tables}"""


def _table(title: str, families: list[object]) -> str:
    head = f"## {title}\n\n| metric | type | labels | what |\n|---|---|---|---|\n"
    return head + "".join(row for family in families for row in _rows(family))


def _rows(family: object) -> Iterator[str]:
    for metric in vars(family).values():
        if isinstance(metric, MetricWrapperBase):
            (described,) = metric.describe()
            name = described.name + ("_total" if described.type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            yield f"| `{name}` | {described.type} | {labels} | {described.documentation} |\n"


PAGES = {"configuration.md": configuration, "metrics.md": metric_page}


if __name__ == "__main__":
    main()
