"""`kvmesh config`: check a file, show what holds, describe every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel

from kvmesh.cli.options import ConfigFile
from kvmesh.cli.settings import check_workers, endpoint_url, load, workers_of
from kvmesh.common.config import Config

app = typer.Typer(no_args_is_help=True, help="Check and show the configuration.")


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="File; without one, the environment alone.")] = None,
    config: ConfigFile = None,
) -> None:
    """Say whether a configuration is valid, and what it would start.

    Every unknown key is named with the nearest known one; exits with 1 when something is wrong.

    \b
    Example:
      kvmesh config check deploy/kvmesh.yaml
    """
    path = file or config
    settings = load(path)
    check_workers(settings)
    print(f"{path or 'the environment'}: ok")
    for served in settings.served():
        key = served.model.name or served.model.id
        workers = ", ".join(w.name for w in workers_of(settings) if w.config.model == served.model)
        print(f"  model {key} on {served.engine.kind}: {workers}")
    print(f"  policy {settings.router.policy}, endpoint {endpoint_url(settings)}")


@app.command()
def show(config: ConfigFile = None) -> None:
    """Print the configuration that holds: file, KVMESH_... variables and defaults, as YAML.

    \b
    Examples:
      kvmesh config show --config mesh.yaml
      KVMESH_ROUTER__POLICY=random kvmesh config show
    """
    settings = load(config)
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


@app.command()
def schema(
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="A file with every key at its default, commented.")
    ] = False,
) -> None:
    """Describe every key: JSON Schema, for editors and checks, or a commented file.

    \b
    Example:
      kvmesh config schema --yaml > mesh.yaml
    """
    if as_yaml:
        print("\n".join(commented(Config())))
    else:
        print(json.dumps(Config.model_json_schema(), indent=2))


def commented(section: BaseModel, indent: str = "") -> list[str]:
    """Lines of a file with every key at its value, and what it means."""
    lines = []
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *commented(value, indent + "  ")]
            continue
        dumped = section.model_dump(mode="json", include={name})[name]
        comment = f"  # {field.description}" if field.description else ""
        lines.append(f"{indent}{name}: {json.dumps(dumped, ensure_ascii=False)}{comment}")
    return lines
