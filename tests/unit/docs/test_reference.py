"""The reference pages say what the code does."""

from pathlib import Path

from kvmesh.common.errors import TABLE, ErrorCode

REFERENCE = Path(__file__).resolve().parents[3] / "docs" / "reference"


def test_errors_page_lists_the_whole_table() -> None:
    rows = {
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in (REFERENCE / "errors.md").read_text().splitlines()
        if line.startswith("| ")
    }
    expected = {
        (
            ErrorCode.Name(code).removeprefix("ERROR_CODE_"),
            spec.grpc.name,
            str(spec.http),
            spec.openai_type,
            str(spec.openai_code),
            "yes" if spec.retryable else "no",
        )
        for code, spec in TABLE.items()
    }
    assert rows - {("code", "gRPC", "HTTP", "OpenAI type", "OpenAI code", "retryable")} == expected
