"""The call that an answer of nothing but arguments is, wherever it is cut."""

from __future__ import annotations

import pytest

from kvmesh.frontend.serving.calls import NamedCall

ARGUMENTS = '{"x": [1, 2], "text": "a } b"}'


@pytest.mark.parametrize("at", range(len(ARGUMENTS)))
def test_a_named_call(at: int) -> None:
    call = NamedCall("f")
    deltas = [delta for piece in (ARGUMENTS[:at], ARGUMENTS[at:]) for delta in call.feed(piece)]
    assert "".join(delta.arguments for delta in deltas) == ARGUMENTS
    assert [delta.name for delta in deltas if delta.id] == ["f"]
    assert {delta.index for delta in deltas} == {0}
