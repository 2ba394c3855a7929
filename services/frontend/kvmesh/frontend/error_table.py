"""`python -m kvmesh.frontend.error_table PAGE`: write the one table of errors into its reference."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from kvmesh.common.errors import TABLE, KvmeshError
from kvmesh.frontend.anthropic.errors import error_json
from kvmesh.v1.errors_pb2 import ErrorCode

_HEAD = (
    "| code | gRPC | HTTP | OpenAI type | OpenAI code | Anthropic type | retryable |",
    "|---|---|---:|---|---|---|---|",
)
_TABLE = re.compile(r"^\| code \|.*?(?=^(?!\|)|\Z)", re.MULTILINE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvmesh.frontend.error_table", description=__doc__)
    parser.add_argument("page", type=Path, help="file that has the table")
    page: Path = parser.parse_args().page
    page.write_text(with_table(page.read_text()))


def with_table(page: str) -> str:
    """The page with the table as the code has it."""
    lines = "".join(f"{line}\n" for line in (*_HEAD, *map(_row, TABLE)))
    written, found = _TABLE.subn(lines, page)
    if found != 1:
        raise ValueError(f"the page has {found} tables of errors, not one")
    return written


def _row(code: ErrorCode) -> str:
    spec = TABLE[code]
    cells = (
        ErrorCode.Name(code).removeprefix("ERROR_CODE_"),
        spec.grpc.name,
        spec.http,
        spec.openai_type,
        spec.openai_code,
        error_json(KvmeshError(code, ""), "")["error"]["type"],
        "yes" if spec.retryable else "no",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
