"""Stop strings, split at every border."""

from __future__ import annotations

import random

import pytest

from kvmesh.frontend.stop import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    watcher = StopStrings(stops)
    shown = "".join(watcher.feed(piece) for piece in pieces)
    return shown + ("" if watcher.matched else watcher.flush()), watcher.matched


@pytest.mark.parametrize("at", range(1, 14))
@pytest.mark.parametrize("then", range(1, 14))
def test_every_pair_of_borders(at: int, then: int) -> None:
    text = "one two</s>three"
    first, second = sorted((at, then))
    pieces = [text[:first], text[first:second], text[second:]]
    assert run(["</s>"], pieces) == ("one two", "</s>")


def test_one_character_at_a_time_with_false_starts() -> None:
    assert run(["aab"], list("aaaab")) == ("aa", "aab")
    assert run(["END"], list("EN ENEN EEND x")) == ("EN ENEN E", "END")


def test_first_match_wins_over_longer_ones() -> None:
    assert run(["world", "o w"], ["hello world"]) == ("hell", "o w")


def test_nothing_held_back_without_reason() -> None:
    watcher = StopStrings(["\n\n"])
    assert watcher.feed("abc") == "abc"
    assert watcher.feed("d\n") == "d"
    assert watcher.feed("e") == "\ne"


def test_end_of_text_shows_what_was_held() -> None:
    assert run(["</stop>"], ["ends in </sto"]) == ("ends in </sto", None)


def test_nothing_after_a_match() -> None:
    watcher = StopStrings(["x"])
    assert watcher.feed("axb") == "a"
    assert watcher.feed("more") == ""


@pytest.mark.parametrize("seed", range(300))
def test_like_searching_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(30))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(3, 7))) for _ in range(2)]
    pieces, at = [], 0
    while at < len(text):
        step = rng.randrange(1, 5)
        pieces.append(text[at : at + step])
        at += step
    shown, matched = run(stops, pieces)
    # The stop string that is complete first, as a server that stops at once sees it.
    ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, matched) == (text, None)
    else:
        assert matched in stops
        assert text.startswith(shown + matched)
        assert not any(stop in shown for stop in stops)
