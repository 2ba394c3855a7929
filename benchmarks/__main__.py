"""Runs every benchmark, or those named, and writes docs/benchmarks.md: `benchmarks [--quick] [NAME ...]`.

What was not run, failed, or could not be measured here keeps its section of the page.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import COLUMNS, Cell, say

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "docs" / "benchmarks.md"
NOT_BENCHMARKS = {
    "__main__",
    "event_roles",
    "harness",
    "load_client",
    "peers",
    "raw_nixl",
    "selection_peer",
    "sse_client",
}


def section(result: dict, flags: str) -> str:
    lines = [
        f"## {result['benchmark']}",
        "",
        f"`.venv/bin/python benchmarks/{result['benchmark']}.py {flags}".rstrip()
        + f"`, on {result['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---:|---|---:|---|---|---|",
        *(f"| {' | '.join(Cell(**fields).row())} |" for fields in result["cells"]),
    ]
    return "\n".join(lines) + "\n"


def kept() -> dict[str, str]:
    """The page's sections as they are, by benchmark."""
    if not OUTPUT.exists():
        return {}
    sections = OUTPUT.read_text().split("\n## ")[1:]
    return {text.split("\n", 1)[0]: f"## {text.rstrip()}\n" for text in sections}


def main() -> None:
    flags = [argument for argument in sys.argv[1:] if argument == "--quick"]
    named = {argument for argument in sys.argv[1:] if not argument.startswith("-")}
    files = {file.stem: file for file in sorted(HERE.glob("*.py")) if file.stem not in NOT_BENCHMARKS}
    if unknown := named - files.keys():
        sys.exit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(files)}")
    sections, failed = kept(), []
    for name in sorted(named or files):
        say(f"== {name}")
        run = subprocess.run(
            [sys.executable, str(files[name]), "--json", *flags],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if run.returncode:
            failed.append(name)
        elif json.loads(run.stdout)["cells"]:
            sections[name] = section(json.loads(run.stdout), " ".join(flags))
    head = (
        "# Benchmarks\n\n"
        "Written by `make bench`. Figures are medians of interleaved runs; machines are noisy,"
        " so read the ratios. A goal is a ratio to the best peer, else to the limit, else absolute.\n\n"
    )
    OUTPUT.write_text(head + "\n".join(text for name, text in sorted(sections.items()) if name in files))
    say(f"wrote {OUTPUT}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
