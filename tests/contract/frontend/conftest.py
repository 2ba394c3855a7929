"""A frontend with one prefill and one decode worker that answer `ANSWER`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import ANSWER, EOS, Serve, Split, frontend, make, model_path
from fixtures.nats import NatsServer
from fixtures.scripted_worker import ROLE_DECODE, ROLE_PREFILL
from fixtures.tenanted import Tenanted, tenanted
from fixtures.text import TEMPLATES, checkpoint


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


@pytest.fixture
async def one(nats: NatsServer, answer_ids: list[int]) -> AsyncIterator[Tenanted]:
    """A frontend that asks for keys."""
    async with tenanted(nats, answer_ids) as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path, tokenizer: Tokenizer) -> Serve:
    @asynccontextmanager
    async def serving(
        answer: str, template: str = "qwen", *, marks: bool = False, **model: Any
    ) -> AsyncIterator[Split]:
        """A frontend whose model, with this template, answers so; `marks` as for `checkpoint`."""
        path = checkpoint(tmp_path / template, TEMPLATES[template], marks=marks)
        ids = [*tokenizer.encode(answer, add_special_tokens=False).ids, EOS]
        async with frontend() as front:
            prefill = make(ROLE_PREFILL, ids, path=str(path), **model)
            decode = make(ROLE_DECODE, ids, path=str(path), **model)
            await front.join(prefill, decode)
            split = Split(front, prefill, decode)
            try:
                yield split
                await split.idle()
            finally:
                await prefill.kill()
                await decode.kill()

    return serving
