"""Conversations rendered as `transformers` renders them, and tokenized as it tokenizes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fixtures.frontend import model_path
from fixtures.text import TEMPLATES, TOOLS, checkpoint
from kvmesh.core import TextModel

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Tōkyō", "days": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello,  world! \n"}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "<b>Hé</b> & 'so' 🗼"},
    ],
    "turns": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "3 {{ not a template }}"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]},
        {"role": "tool", "content": '{"sun": true}', "tool_call_id": "abcdefghi", "name": "weather"},
    ],
    "two calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": "123456789", **CALL}] * 2},
        {"role": "tool", "content": "1", "tool_call_id": "123456789"},
        {"role": "tool", "content": "2", "tool_call_id": "123456789"},
        {"role": "user", "content": "And?"},
    ],
    "bad roles": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    "no content": [{"role": "user"}],
    "last is the assistant's": [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "One, two, "},
    ],
}
ARGS: dict[str, dict[str, Any]] = {
    "none": {},
    "some": {
        "enable_thinking": False,
        "date_string": "1 Jan 2026",
        "more": {"it's": [1, 2.5, None, True, "\n"]},
        "extra": {"ü": [1, 2.5, 1e-7, 1e22, -0.0, None, True], 'a"b': "\x7f\n\u2028"},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TextModel, PreTrainedTokenizerFast]]:
    paths = {name: checkpoint(tmp_path_factory.mktemp(name), text) for name, text in TEMPLATES.items()}
    paths["default"] = Path(model_path())
    return {
        name: (TextModel(path), PreTrainedTokenizerFast.from_pretrained(path)) for name, path in paths.items()
    }


def ours(model: TextModel, messages: object, tools: object, args: object, **flags: bool) -> str | None:
    """None where the template refuses."""
    tools_json = None if tools is None else json.dumps(tools).encode()
    try:
        return model.render(json.dumps(messages).encode(), tools_json, json.dumps(args).encode(), **flags)
    except ValueError:
        return None


def theirs(
    tokenizer: PreTrainedTokenizerFast, messages: Any, tools: Any, args: dict[str, Any], **flags: bool
) -> str | None:
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **flags, **args)
    # jinja2's own errors, and Python's of the template's expressions.
    except Exception:
        return None
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [*TEMPLATES, "default"])
def test_like_transformers(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]], template: str, conversation: str, args: str
) -> None:
    model, tokenizer = models[template]
    messages = CONVERSATIONS[conversation]
    rendered = 0
    for tools in (None, TOOLS):
        for prompt in (True, False):
            flags = {"add_generation_prompt": prompt}
            expected = theirs(tokenizer, messages, tools, ARGS[args], **flags)
            assert ours(model, messages, tools, ARGS[args], **flags) == expected
            if expected is not None:
                rendered += 1
                expected_ids = tokenizer.encode(expected, add_special_tokens=False)
                assert model.encode(expected) == expected_ids
    assert rendered or conversation in ("bad roles", "no content", "two calls", "tools")


@pytest.mark.parametrize("content", ["One, two, ", "One, two,", [{"type": "text", "text": "Hm "}]])
@pytest.mark.parametrize("template", [*TEMPLATES, "default"])
def test_final_message_continued(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]], template: str, content: object
) -> None:
    model, tokenizer = models[template]
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": content}]
    flags = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs(tokenizer, messages, None, {"date_string": "now"}, **flags)
    assert ours(model, messages, None, {"date_string": "now"}, **flags) == expected
    if isinstance(content, str):
        assert expected is not None
        assert expected.rstrip().endswith("One, two,")


def test_default_model_renders(models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]]) -> None:
    model, tokenizer = models["default"]
    messages = CONVERSATIONS["turns"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.render(json.dumps(messages).encode()) == text
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert model.encode_chat(json.dumps(messages).encode()) == ids


@pytest.mark.parametrize("template", [*TEMPLATES, "default"])
def test_a_growing_conversation_makes_the_tokens_of_the_whole(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]], template: str
) -> None:
    model, tokenizer = models[template]
    messages = []
    for turn in range(5):
        said = f"Turn {turn}: what  is <|im_end|> or </s> in 你好 🗼?\n\n  And é, e\u0301?"
        messages += [{"role": "user", "content": said}]
        written = json.dumps(messages).encode()
        expected = tokenizer.encode(model.render(written), add_special_tokens=False)
        for scope in ("", "tenant:x", ""):
            assert model.encode_chat(written, scope=scope) == expected
        messages += [
            {"role": "assistant", "content": f"Answer {turn}, as long as it takes to be found again."}
        ]


def test_refusal_in_the_templates_words(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]],
) -> None:
    model, _ = models["mistral"]
    with pytest.raises(
        ValueError, match=r"^After the optional system message, conversation roles must alternate$"
    ):
        model.render(json.dumps(CONVERSATIONS["bad roles"]).encode())


@pytest.mark.parametrize(
    "messages", [b"", b"{}", b"[1", b"[" * 10_000, b'[{"role": "user", "content": "\xff"}]']
)
def test_bad_input_is_an_error(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]], messages: bytes
) -> None:
    with pytest.raises(ValueError, match="messages must be a JSON list"):
        models["default"][0].render(messages)
    with pytest.raises(ValueError, match="tools must be a JSON list"):
        models["default"][0].render(b"[]", b"{}")
    with pytest.raises(ValueError, match="template arguments must be a JSON object"):
        models["default"][0].render(b"[]", None, b"[]")


def test_named_templates(tmp_path: Path) -> None:
    named = {"default": "plain {{ messages|length }}", "tool_use": "tools {{ tools|length }}"}
    model = TextModel(checkpoint(tmp_path, named))
    assert model.render(b"[{}]") == "plain 1"
    assert model.render(b"[{}]", b"[{}, {}]") == "tools 2"
    assert model.render(b"[{}]", b"[]") == "tools 0"
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("file")
    assert TextModel(tmp_path).render(b"[{}]", b"[]") == "file"


def test_no_template_and_a_broken_one(tmp_path: Path) -> None:
    model = TextModel(checkpoint(tmp_path / "none", None))
    assert not model.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        model.render(b"[]")
    model = TextModel(checkpoint(tmp_path / "broken", "{% if %}"))
    assert model.has_chat_template
    with pytest.raises(ValueError, match="the template is broken"):
        model.render(b"[]")
    assert model.encode("text") == TextModel(model_path()).encode("text")


def test_directories_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"no tokenizer\.json"):
        TextModel(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextModel(tmp_path)
    shutil.copy(Path(model_path(), "tokenizer.json"), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        TextModel(tmp_path)


@pytest.mark.parametrize(
    ("template", "tools", "reasoning", "opens"),
    [
        ("llama", "llama3", None, None),
        ("qwen", "hermes", "think", None),
        ("mistral", "mistral", None, None),
        ("mixed", None, None, None),
        ("r1", None, "think", True),
        ("default", None, None, None),
    ],
)
def test_formats_are_those_of_the_template(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]],
    template: str,
    tools: str | None,
    reasoning: str | None,
    opens: bool | None,
) -> None:
    model = models[template][0]
    assert (model.tool_format, model.reasoning_format) == (tools, reasoning)
    prompt = model.encode_chat(b'[{"role": "user", "content": "a long question " }]')
    assert model.opens_reasoning(prompt) is opens
    assert model.opens_reasoning(prompt[-16:]) is opens


def test_prompts_that_open_or_close_reasoning(
    models: dict[str, tuple[TextModel, PreTrainedTokenizerFast]],
) -> None:
    model = models["qwen"][0]
    messages = b'[{"role": "user", "content": "x"}]'
    closed = model.encode_chat(messages, args_json=b'{"enable_thinking": false}')
    assert model.opens_reasoning(closed) is False
    assert model.opens_reasoning(closed, "mistral") is None
    opened = models["r1"][0].encode_chat(messages)
    assert models["default"][0].opens_reasoning(opened) is None
    assert models["default"][0].opens_reasoning(opened, "deepseek-r1") is True
    with pytest.raises(ValueError, match="no such reasoning format"):
        model.opens_reasoning(opened, "no")
