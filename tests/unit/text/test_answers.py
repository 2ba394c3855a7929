"""One answer from ids to what a client sees: stop strings, reasoning and tool calls together, however cut."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fixtures.frontend import model_path
from fixtures.text import MARKS, checkpoint
from kvmesh.core import TextModel, TextStream


@pytest.fixture(scope="module")
def smol() -> TextModel:
    return TextModel(model_path())


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel(checkpoint(tmp_path_factory.mktemp("marked"), None, marks=True))


class Answer:
    def __init__(self, model: TextModel, pieces: list[list[int]], **options: Any) -> None:
        self.content = self.reasoning = ""
        self.calls: list[list[str]] = []
        self.stream = stream = TextStream(model, **options)
        for delta in (*map(stream.feed, pieces), stream.flush()):
            self.content += delta.content
            self.reasoning += delta.reasoning
            for index, call_id, name, arguments in delta.tool_calls:
                if name is not None:
                    assert call_id
                    assert index == len(self.calls)
                    self.calls.append([name, ""])
                self.calls[index][1] += arguments


def every_cut(ids: list[int]) -> list[list[list[int]]]:
    pairs = [(i, j) for i in range(len(ids)) for j in range(i, len(ids))]
    return [[ids], [[i] for i in ids], *([ids[:i], ids[i:j], ids[j:]] for i, j in pairs)]


def test_stop_string_at_every_cut(smol: TextModel) -> None:
    ids = smol.encode("one two</stop> three, and nothing more 🗼")
    for pieces in every_cut(ids):
        answer = Answer(smol, pieces, stops=["</stop>"])
        assert (answer.content, answer.stream.matched) == ("one two", "</stop>")
        assert smol.decode(ids[: answer.stream.tokens]).rstrip(" >").endswith("</stop")
        assert smol.decode(ids[: answer.stream.tokens - 1]).find("</stop>") < 0


@pytest.mark.parametrize("seed", range(300))
def test_stop_strings_like_searching_the_whole_text(smol: TextModel, seed: int) -> None:
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "aé🗼"
    text = "".join(rng.choice(letters) for _ in range(30))
    stops = ["".join(rng.choice(letters) for _ in range(rng.randrange(2, 6))) for _ in range(3)]
    ids = smol.encode(text)
    pieces, at = [], 0
    while at < len(ids):
        step = rng.randrange(1, 5)
        pieces.append(ids[at : at + step])
        at += step
    answer = Answer(smol, pieces, stops=stops)
    # The one that is complete first; of several at one place, the longest.
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (answer.content, answer.stream.matched) == (text, None)
    else:
        end, length, stop = min(ends)
        assert (answer.content, answer.stream.matched) == (text[: end + length], stop)


def letter_by_letter(model: TextModel, text: str, stops: list[str]) -> tuple[str, str | None]:
    answer = Answer(model, [model.encode(letter) for letter in text], stops=stops)
    return answer.content, answer.stream.matched


def test_stop_strings_with_false_starts(smol: TextModel) -> None:
    assert letter_by_letter(smol, "aaaab", ["aab"]) == ("aa", "aab")
    assert letter_by_letter(smol, "EN ENEN EEND x", ["END"]) == ("EN ENEN E", "END")
    assert letter_by_letter(smol, "hello world", ["world", "o w"]) == ("hell", "o w")
    assert letter_by_letter(smol, "ends in </sto", ["</stop>"]) == ("ends in </sto", None)


def test_nothing_held_back_without_reason(smol: TextModel) -> None:
    stream = TextStream(smol, stops=["\n\n"])
    assert stream.feed(smol.encode("abc")).content == "abc"
    newline = smol.encode("\n")
    assert not stream.feed(newline)
    assert stream.feed(smol.encode("e")).content == "\ne"
    assert not stream.feed(newline + newline + smol.encode("rest"))
    assert stream.matched == "\n\n"
    assert not stream.feed(smol.encode("more"))
    assert not stream.flush()


TEXT = (
    "<think>\nThe user wants 🗼.\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Tōkyō", "days": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("kind", ["smol", "marked"])
def test_reasoning_and_calls_at_every_cut(kind: str, request: pytest.FixtureRequest) -> None:
    model: TextModel = request.getfixturevalue(kind)
    ids = model.encode(TEXT)
    for mark in MARKS:
        special = model.token_id(mark)
        assert special is None if kind == "smol" else special is not None and model.is_special(special)
    thought = len(model.encode(TEXT[: TEXT.index("</think>") + len("</think>")]))
    for pieces in every_cut(ids):
        answer = Answer(model, pieces, tool_format="hermes", reasoning_format="qwen3")
        assert answer.reasoning == "The user wants 🗼."
        assert answer.content == "Let me see."
        assert answer.calls == [["weather", '{"city": "Tōkyō", "days": [1, 2]}'], ["time", "{}"]]
        assert abs(answer.stream.reasoning_tokens - thought) <= 1
        assert answer.stream.tokens == len(ids)


def test_arguments_come_as_they_are_written(smol: TextModel) -> None:
    stream = TextStream(smol, tool_format="hermes")
    ids = smol.encode(
        '<tool_call>{"name": "f", "arguments": {"text": "a long text, piece by piece"}}</tool_call>'
    )
    pieces = [call for token in ids for call in stream.feed([token]).tool_calls]
    assert [name for _, _, name, _ in pieces][:2] == ["f", None]
    assert len(pieces) > 6
    assert "".join(arguments for *_, arguments in pieces) == '{"text": "a long text, piece by piece"}'


def test_ids_of_calls(smol: TextModel) -> None:
    ids = smol.encode('[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]')
    seen = set()
    for _ in range(100):
        seen |= {call[1] for call in TextStream(smol, tool_format="json").feed(ids).tool_calls}
    assert len(seen) == 200
    assert all(isinstance(each, str) and each.startswith("call_") and len(each) == 29 for each in seen)
    ids = smol.encode('[TOOL_CALLS][{"name": "f", "arguments": {}}]')
    ((_, mistral, _, _),) = TextStream(smol, tool_format="mistral").feed(ids).tool_calls
    assert mistral is not None
    assert len(mistral) == 9
    assert mistral.isalnum()


def test_calls_of_unknown_functions_are_text(smol: TextModel) -> None:
    text = '{"name": "other", "parameters": {"x": 1}}'
    answer = Answer(smol, [smol.encode(text)], tool_format="llama3", tool_names=["mine"])
    assert (answer.content, answer.calls) == (text, [])
    answer = Answer(smol, [smol.encode(text)], tool_format="llama3", tool_names=["mine", "other"])
    assert (answer.content, answer.calls) == ("", [["other", '{"x": 1}']])


def test_answer_that_begins_within_reasoning(smol: TextModel) -> None:
    ids = smol.encode("hm\n</think>\n\nYes")
    for options in ({"reasoning_format": "deepseek-r1"}, {"reasoning_format": "think", "in_reasoning": True}):
        answer = Answer(smol, [ids], **options)
        assert (answer.reasoning, answer.content) == ("hm", "Yes")
    outside = Answer(smol, [ids], reasoning_format="deepseek-r1", in_reasoning=False)
    assert (outside.reasoning, outside.content) == ("", "hm\n</think>\n\nYes")
    assert outside.stream.reasoning_tokens == 0


def test_stop_string_within_a_call(smol: TextModel) -> None:
    ids = smol.encode('<tool_call>{"name": "f", "arguments": {"a": "STOP"}}</tool_call>')
    answer = Answer(smol, [[token] for token in ids], tool_format="hermes", stops=["STOP"])
    assert (answer.content, answer.calls, answer.stream.matched) == ("", [["f", '{"a": "']], "STOP")


def test_marks_are_special_where_no_format_wants_them(marked: TextModel) -> None:
    ids = marked.encode("<think>a</think><tool_call>b")
    assert Answer(marked, [ids]).content == "ab"
    assert Answer(marked, [ids], reasoning_format="think").content == "b"


@pytest.mark.parametrize("options", [{"tool_format": "no"}, {"reasoning_format": "no"}])
def test_unknown_formats(smol: TextModel, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no such .* format, name: no"):
        TextStream(smol, **options)  # pyright: ignore[reportArgumentType]
