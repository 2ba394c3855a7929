"""`kvmesh chat`: one answer, or a conversation."""

from __future__ import annotations

import readline  # noqa: F401 - gives input() editing and history
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvmesh.cli.endpoint import Answer, stream_chat
from kvmesh.common.errors import KvmeshError


def ask(url: str, prompt: str, system: str, console: Console, **parameters: Any) -> None:
    """Stream one answer, then say how it went, on a terminal only, so that the answer can be piped."""
    answer = _stream(url, [*_system(system), {"role": "user", "content": prompt}], console, parameters)
    if console.is_terminal:
        console.print(f"[dim]{escape(answer.summary())}[/]", highlight=False)


def converse(url: str, system: str, console: Console, **parameters: Any) -> None:
    """Read prompts until Ctrl-D or an empty Ctrl-C; Ctrl-C ends a running answer."""
    console.print("[dim]Ctrl-D ends, Ctrl-C stops an answer, /new begins anew.[/]\n")
    messages = _system(system)
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if prompt == "/new":
            messages = _system(system)
        if not prompt or prompt == "/new":
            continue
        asked = [*messages, {"role": "user", "content": prompt}]
        try:
            answer = _stream(url, asked, console, parameters)
        except KeyboardInterrupt:
            console.print("\n[dim]stopped[/]\n")
            continue
        except KvmeshError as error:
            console.print(f"[red]error:[/] {escape(error.message)}\n", highlight=False)
            continue
        console.print(f"[dim]{escape(answer.summary())}[/]\n", highlight=False)
        messages = [*asked, {"role": "assistant", "content": answer.text}]


def _system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def _stream(url: str, messages: list[dict[str, str]], console: Console, parameters: dict[str, Any]) -> Answer:
    answer = Answer()
    for piece in stream_chat(url, messages, answer, **parameters):
        # Exactly what the model said: nothing of it is markup, nothing is wrapped.
        console.file.write(piece)
        console.file.flush()
    console.file.write("\n")
    console.file.flush()
    return answer
