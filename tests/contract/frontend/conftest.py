"""A frontend with one prefill and one decode worker that answer `ANSWER`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import ANSWER, EOS, Split, frontend, make, model_path
from fixtures.scripted_worker import ROLE_DECODE, ROLE_PREFILL


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{model_path()}/tokenizer.json")


@pytest.fixture(scope="session")
def answer_ids(tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(ANSWER, add_special_tokens=False).ids, EOS]


@pytest.fixture
async def split(answer_ids: list[int]) -> AsyncIterator[Split]:
    async with frontend() as front:
        prefill = make(ROLE_PREFILL, answer_ids)
        decode = make(ROLE_DECODE, answer_ids)
        await front.join(prefill, decode)
        yield Split(front, prefill, decode)
        await prefill.kill()
        await decode.kill()
