"""The stub of kvmesh.core says what the module has: the same names, parameters and defaults."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmesh.core

STUB = Path(kvmesh.core.__file__).with_name("core.pyi")


def documented() -> Iterator[tuple[str, ast.stmt]]:
    """All that the stub names, by dotted name; TypedDicts are the stub's own."""
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node
        elif isinstance(node, ast.ClassDef) and "TypedDict" not in map(ast.unparse, node.bases):
            yield node.name, node
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member
                elif isinstance(member, ast.AnnAssign):
                    yield f"{node.name}.{ast.unparse(member.target)}", member


STUBBED = dict(documented())


def runtime(name: str) -> object:
    value: object = kvmesh.core
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    "name", [name for name, node in STUBBED.items() if isinstance(node, ast.FunctionDef)]
)
def test_parameters_agree(name: str) -> None:
    node = STUBBED[name]
    assert isinstance(node, ast.FunctionDef)
    found = runtime(name)
    if not callable(found):  # a property
        return
    if name.endswith((".__new__", ".__init__")):
        found = runtime(name.rpartition(".")[0])
    assert callable(found)
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]
    named = [*node.args.args, *([node.args.vararg] if node.args.vararg else []), *node.args.kwonlyargs]
    arguments = [a.arg for a in named if a.arg not in ("self", "cls")]
    assert [p.name for p in parameters] == arguments
    defaults = [ast.literal_eval(d) for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
    assert [p.default for p in parameters if p.default is not p.empty] == defaults


def test_nothing_is_left_out() -> None:
    public = set()
    for name, value in vars(kvmesh.core).items():
        if name.startswith("_"):
            continue
        public.add(name)
        if inspect.isclass(value) and not issubclass(value, Exception):
            public |= {f"{name}.{member}" for member in vars(value) if not member.startswith("_")}
    assert public <= STUBBED.keys()
