"""The `kvmesh` command."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from kvmesh.cli.groups import LazyGroups
from kvmesh.cli.home import Home
from kvmesh.cli.options import ConfigFile
from kvmesh.cli.settings import model_flags, parse_alias, running_config
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError, invalid

# `status` exits with this when no mesh runs.
NOT_RUNNING = 3

app = typer.Typer(
    cls=LazyGroups,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Serve a large language model from a mesh of prefill and decode workers.\n\n"
    "Start here:  [bold]kvmesh up --detach[/], then [bold]kvmesh chat[/]",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvmesh {version('kvmesh-cli')}")
        raise typer.Exit


@app.callback()
def kvmesh(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """What all commands share."""


@app.command()
def up(
    config: ConfigFile = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="ID|DIR", help="`default`, a directory, or a Hugging Face id; may be repeated."),
    ] = None,
    engine: Annotated[Literal["sglang", "mock"] | None, typer.Option(help="What computes.")] = None,
    prefill: Annotated[int | None, typer.Option(metavar="N", min=0, help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(metavar="N", min=0, help="Decode workers.")] = None,
    aggregated: Annotated[int | None, typer.Option(metavar="N", min=0, help="Aggregated workers.")] = None,
    routers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Replicas of the router.")] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="A further name of a model; may be repeated."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it serves, and leave it running.")
    ] = False,
) -> None:
    """Start a mesh on this machine: NATS, router, KV block manager, workers and the OpenAI endpoint.

    In the foreground Ctrl-C drains it, a second Ctrl-C kills it.

    \b
    Examples:
      kvmesh up --detach
      kvmesh up --model ./my-model --prefill 2 --decode 4
      kvmesh up --prefill 0 --decode 0 --aggregated 1    # requests are not split
      kvmesh up --model ./one --model ./other            # both behind one endpoint, workers for each
      kvmesh up --engine mock                            # all but the model is real
      kvmesh up --routers 2                              # one may die, and no request fails
      kvmesh up --alias gpt-4o=default                   # for clients that insist on a name
    """
    from kvmesh.cli import up as starting

    workers = {"prefill": prefill, "decode": decode, "aggregated": aggregated}
    overrides: dict[str, dict[str, Any]] = {
        "engine": {"kind": engine},
        "workers": workers,
        "router": {"replicas": routers},
    }
    if alias:
        overrides["frontend"] = {"aliases": dict(map(parse_alias, alias))}
    given: dict[str, Any] = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in overrides.items()
    }
    if model:
        given |= model_flags(model)
    starting.up(config, given, detach=detach, console=_console())


@app.command()
def down(
    config: ConfigFile = None,
    now: Annotated[bool, typer.Option("--now", help="Kill at once instead of draining.")] = False,
) -> None:
    """Stop the mesh, whatever state it is in.

    Live requests may end first; Ctrl-C kills what is left. Does nothing when nothing runs.
    """
    from kvmesh.cli import down as stopping

    stopping.down(running_config(config), _console(), now=now)


@app.command()
def status(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Show processes, workers, stores and the router; exit with 3 when no mesh runs.

    \b
    Examples:
      kvmesh status --watch
      kvmesh status --json | jq '.workers[] | {id, requests}'
    """
    from kvmesh.cli.status import collect

    home = _home(config)
    document = asyncio.run(collect(home))
    if document is None:
        _say_not_running(home)
        raise typer.Exit(NOT_RUNNING)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    from kvmesh.cli.status_view import render

    console = _console()
    if not watch:
        console.print(render(document))
        return
    from rich.live import Live

    # On a terminal that cannot go back, or none, each look is printed below the last.
    redraws = console.is_terminal and not console.is_dumb_terminal
    with Live(console=console, screen=True, auto_refresh=False) if redraws else nullcontext() as live:
        while document is not None:
            if live is None:
                console.print(render(document))
            else:
                live.update(render(document), refresh=True)
            time.sleep(1.0)
            document = asyncio.run(collect(home))
    _say_not_running(home)
    raise typer.Exit(NOT_RUNNING)


@app.command()
def logs(
    role: Annotated[
        str | None, typer.Argument(metavar="[ROLE]", help="A role or a process, e.g. decode or decode-0.")
    ] = None,
    config: ConfigFile = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each log.")] = 20,
    raw: Annotated[bool, typer.Option("--raw", help="Lines as they are in the file.")] = False,
) -> None:
    """Show what the processes have written, one's or all.

    \b
    Examples:
      kvmesh logs -f
      kvmesh logs prefill -n 100
    """
    from kvmesh.cli import logs as reading

    reading.logs(_home(config), role, _console(), lines=lines, follow=follow, raw=raw)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="`-` reads stdin.")] = None,
    config: ConfigFile = None,
    url: Annotated[
        str | None, typer.Option(help="Endpoint, e.g. http://host:8000; without it, this machine's mesh.")
    ] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 512,
    key: Annotated[
        str, typer.Option(envvar="KVMESH_API_KEY", help="API key, where the endpoint asks for one.")
    ] = "",
) -> None:
    """Ask the model; without a prompt, talk to it.

    \b
    Examples:
      kvmesh chat
      kvmesh chat "Why is the sky blue?"
      git diff | kvmesh chat -
    """
    from kvmesh.cli import chat as chatting

    parameters: dict[str, Any] = {"max_tokens": max_tokens, "key": key}
    if temperature is not None:
        parameters["temperature"] = temperature
    if url is None:
        url = _running_url(config)
        parameters["certificate"] = running_config(config).frontend.tls.cert
    endpoint = url.rstrip("/").removesuffix("/v1")
    console = _console()
    if prompt is None and sys.stdin.isatty():
        chatting.converse(endpoint, system, console, **parameters)
        return
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    chatting.ask(endpoint, text or "", system, console, **parameters)


@app.command()
def usage(
    config: ConfigFile = None,
    tenant: Annotated[str | None, typer.Option(help="This one's only.")] = None,
    since: Annotated[
        str, typer.Option(metavar="TIME", help="7d, 24h, or 2030-01-31, in whole hours. Default: all kept.")
    ] = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated, with a header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show what tenants used, by model: requests, tokens of prompts, of these cached, tokens generated.

    
    Examples:
      kvmesh usage --since 24h
      kvmesh usage --tenant acme --since 2030-01-01 --csv > acme.csv
    """
    from kvmesh.cli import usage_command

    usage_command.usage(running_config(config), tenant, since, as_csv=as_csv, as_json=as_json)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def simulate(context: typer.Context) -> None:
    """Simulate a mesh: a trace, engines and routers. `simulate fit` fits its timing to measurements, and
    `simulate record` takes them from a mesh that serves.

    \b
    Examples:
      kvmesh simulate --help
      kvmesh simulate --requests 20000 --per-second 40 --workers 8 --router kv,round-robin
      kvmesh simulate record --out requests.jsonl && kvmesh simulate fit requests.jsonl
    """
    if context.args[:1] == ["record"]:
        # The simulator knows no mesh.
        status = measuring(context.args[1:], prog_name="kvmesh simulate record", standalone_mode=False)
        raise typer.Exit(status or 0)
    from kvmesh.core import simulate

    raise typer.Exit(simulate(context.args))


measuring = typer.Typer(add_completion=False, rich_markup_mode="rich")


@measuring.command()
def record(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write a line for each request.")],
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="Requests to send.")] = 100,
    per_second: Annotated[float, typer.Option(metavar="X", min=0.001, help="A second, Poisson.")] = 1.0,
    longest_prompt: Annotated[int, typer.Option(metavar="N", min=16, help="In tokens.")] = 1024,
    longest_answer: Annotated[int, typer.Option(metavar="N", min=4, help="In tokens.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed sends the same.")] = 0,
    model: Annotated[str, typer.Option(help="As requests name it.")] = "default",
    config: ConfigFile = None,
    url: Annotated[
        str | None, typer.Option(help="Endpoint, e.g. http://host:8000; without it, this machine's mesh.")
    ] = None,
    key: Annotated[
        str, typer.Option(envvar="KVMESH_API_KEY", help="API key, where the endpoint asks for one.")
    ] = "",
) -> None:
    """Send requests of many lengths to a mesh, and write down what they took, for `kvmesh simulate fit`.

    No two prompts share anything. Only aggregated workers can be fitted; they should have nothing else to do.

    \b
    Examples:
      kvmesh simulate record --out requests.jsonl
      kvmesh simulate record --out requests.jsonl --requests 300 --per-second 20 --url http://gpu-node:8000
      kvmesh simulate fit requests.jsonl --out rates.json
    """
    from rich.progress import Progress

    from kvmesh.cli import simulate_record

    if not out.parent.is_dir():
        raise invalid(f"--out {out}: {out.parent} is no directory")
    certificate = ""
    if url is None:
        url = _running_url(config)
        certificate = running_config(config).frontend.tls.cert
    load = simulate_record.Load(requests, per_second, longest_prompt, longest_answer, seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("requests", total=requests)
        recording = simulate_record.record(
            url.rstrip("/").removesuffix("/v1"),
            load,
            lambda: progress.advance(bar),
            model=model,
            key=key,
            certificate=certificate,
        )
        lines = asyncio.run(recording)
    out.write_text(lines)


def _home(config_file: Path | None) -> Home:
    return Home(load_config(config_file).home)


def _running_url(config_file: Path | None) -> str:
    home = _home(config_file)
    status = home.read_status()
    if status is None or home.owner() is None:
        _say_not_running(home)
        raise typer.Exit(NOT_RUNNING)
    return status.url


def _say_not_running(home: Home) -> None:
    Console(stderr=True, highlight=False).print(
        f"no mesh is running in {escape(str(home.root))}: start one with `kvmesh up`", soft_wrap=True
    )


def _console() -> Console:
    return Console(highlight=False)


def main() -> None:
    try:
        app()
    except KvmeshError as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
