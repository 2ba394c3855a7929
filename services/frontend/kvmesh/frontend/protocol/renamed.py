"""Errors of a chat body that was made from another API's, in the words of that API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvmesh.common.errors import KvmeshError


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """`names`: fields of a chat body -> of the client's. Errors that leave the block name the latter."""
    try:
        yield
    except KvmeshError as error:
        rename(error, names)
        raise


def rename(error: KvmeshError, names: Mapping[str, str]) -> None:
    """Also what is below a field is renamed: `stop[1]` where `stop` is."""
    param = error.param or ""
    for name, theirs in names.items():
        if param == name or param.startswith((f"{name}[", f"{name}.")):
            error.param = theirs + param.removeprefix(name)
            error.message = error.message.replace(name, theirs, 1)
            error.args = (error.message,)
            return
