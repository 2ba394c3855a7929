"""The reference pages say what the code does."""

import os
import re
from pathlib import Path

import pytest
import yaml
from anthropic.types import message_create_params
from fastapi.routing import APIRoute
from openai.types import embedding_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from kvmesh.cli import reference
from kvmesh.common.errors import TABLE, ErrorCode
from kvmesh.frontend import app
from kvmesh.frontend.anthropic import request as messages
from kvmesh.frontend.error_table import with_table
from kvmesh.frontend.protocol import Body, ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from kvmesh.frontend.protocol.body import REFUSED
from kvmesh.frontend.responses import request as responses
from kvmesh.frontend.routes.tokenize import DetokenizeRequest, TokenizeRequest

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "docs" / "reference"
TRACES = Path(os.environ.get("KVMESH_TRACES", ROOT.parent / "shared" / "traces"))


def test_errors_page_has_the_table_as_it_is_generated() -> None:
    page = (REFERENCE / "errors.md").read_text()
    assert page == with_table(page), "run `make docs`"
    stale = page.replace("| 413 |", "| 414 |").replace(
        "\n| INTERNAL | INTERNAL | 500", "\n| GONE | INTERNAL | 500"
    )
    assert with_table(stale) == page
    with pytest.raises(ValueError, match="0 tables"):
        with_table("no table")
    # Every code that can travel has a row.
    assert set(TABLE) == set(ErrorCode.values()) - {ErrorCode.ERROR_CODE_UNSPECIFIED}


def test_api_page_lists_every_endpoint() -> None:
    """And what each reads from its query."""
    served: dict[str, set[str]] = {"GET /docs": set(), "GET /openapi.json": set()}
    for part in app._PARTS:
        for route in part.router.routes:
            assert isinstance(route, APIRoute)
            query = {one["name"] for one in (route.openapi_extra or {}).get("parameters", [])}
            for method in route.methods or ():
                served[f"{method} {route.path.replace(':path', '')}"] = query
    # Any number of names, which the description of a route cannot hold.
    served["GET /v1/chat/completions"].add("metadata[NAME]")
    page: dict[str, set[str]] = {}
    section = (REFERENCE / "api.md").read_text().partition("## Every endpoint")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`[A-Z]+ /.*?) \| (.*?) \| ", section.replace("| |", "|  |"), re.MULTILINE):
        for request in re.findall(r"`(.+?)`", row[0]):
            page[request] = set(re.findall(r"`(.+?)`", row[1]))
    assert page == served


def documented() -> dict[str, dict[str, str]]:
    """The fields of the API page by section, with what is done with each."""
    page: dict[str, dict[str, str]] = {}
    section = ""
    for line in (REFERENCE / "api.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif row := re.match(r"\| (`.*?) \| (supported|ignored|refused) \|", line):
            page.setdefault(section, {}).update(dict.fromkeys(re.findall(r"`(\w+)`", row[1]), row[2]))
    return page


@pytest.mark.parametrize(
    ("section", "kind"), [("Tokenize", TokenizeRequest), ("Detokenize", DetokenizeRequest)]
)
def test_api_page_lists_every_field_of_tokens(section: str, kind: type[BaseModel]) -> None:
    assert documented()[section].keys() == kind.model_fields.keys()


@pytest.mark.parametrize(
    ("section", "kind"), [("Chat", ChatCompletionRequest), ("Completions", CompletionRequest)]
)
def test_api_page_lists_every_field(
    section: str, kind: type[ChatCompletionRequest | CompletionRequest]
) -> None:
    page = documented()
    known = page["Both endpoints"] | page[section]
    supported = {field.alias or name for name, field in kind.model_fields.items()}
    assert {name for name, what in known.items() if what == "supported"} == supported
    assert {name for name, what in known.items() if what == "refused"} == REFUSED.keys() - supported


def test_api_page_lists_every_field_of_embeddings() -> None:
    fields = documented()["Embeddings"]
    assert fields == dict.fromkeys(EmbeddingRequest.model_fields, "supported")
    assert fields.keys() >= embedding_create_params.EmbeddingCreateParams.__annotations__.keys()


@pytest.mark.parametrize(
    ("section", "schema"),
    [("Chat", "CreateChatCompletionRequest"), ("Completions", "CreateCompletionRequest")],
)
def test_api_page_lists_every_field_of_openai(section: str, schema: str) -> None:
    file = TRACES / "openai" / "openapi.yaml"
    if not file.is_file():
        pytest.skip(f"no {file}; set KVMESH_TRACES to the folder of public traces")
    schemas = yaml.load(file.read_text(), yaml.CSafeLoader)["components"]["schemas"]

    def fields(node: dict) -> set[str]:
        found = set(node.get("properties", ()))
        for part in node.get("allOf", ()):
            found |= fields(schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part)
        return found

    page = documented()
    assert fields(schemas[schema]) <= (page["Both endpoints"] | page[section]).keys()


@pytest.mark.parametrize(
    ("section", "kind", "refused", "client"),
    [
        (
            "Messages",
            messages.MessagesRequest,
            messages.REFUSED,
            message_create_params.MessageCreateParamsBase,
        ),
        (
            "Responses",
            responses.ResponsesRequest,
            responses.REFUSED,
            response_create_params.ResponseCreateParamsBase,
        ),
    ],
)
def test_api_page_lists_every_field_of_the_other_apis(
    section: str, kind: type[Body], refused: frozenset[str], client: type
) -> None:
    page = documented()[section]
    assert {name for name, what in page.items() if what == "supported"} == set(kind.model_fields)
    assert {name for name, what in page.items() if what == "refused"} == refused
    assert client.__annotations__.keys() <= page.keys()


@pytest.mark.parametrize("name", reference.PAGES)
def test_generated_pages_are_what_the_code_has(name: str) -> None:
    written = (REFERENCE / name).read_text()
    assert written == reference.PAGES[name](), "run `make docs`"
