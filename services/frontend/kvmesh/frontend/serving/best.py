"""The best of more answers than a client wants to see: the likeliest, token by token."""

from __future__ import annotations

from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.choices import Choice


def best(choices: list[Choice], answers: Answers, wanted: int) -> list[Choice]:
    """Of each prompt's choices, numbered as in `answers`, the `wanted` best; best first, numbered anew."""
    drawn, kept = answers.choices, []
    for first in range(0, len(choices), drawn):
        worth = {i: choices[i].worth(answers.echoed(i)) for i in range(first, first + drawn)}
        kept += sorted(worth, key=lambda i: worth[i], reverse=True)[:wanted]
    for index, i in enumerate(kept):
        choices[i].index = index
    return [choices[i] for i in kept]
