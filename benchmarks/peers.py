"""Peers from PyPI, each in a virtual environment of its own below `.cache/peers`, never in the product's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from harness import ROOT, say

PEERS = ROOT / ".cache" / "peers"
DYNAMO = "1.6.1"
LMCACHE = "0.5.6"
MOONCAKE = "0.3.13.post1"
# What of its dependencies its Python side cannot do without.
_DYNAMO_NEEDS = [
    "pydantic",
    "uvloop",
    "pyyaml",
    "msgspec",
    "transformers",
    "tokenizers",
    "zstandard",
    "prometheus-client",
    "tqdm",
    "aiohttp",
    "pyzmq",
    "msgpack",
]


def environment(name: str, packages: Sequence[str], *, bare: Sequence[str] = ()) -> Path:
    """The Python of the environment `name`, made at first use; takes minutes then.

    `bare` packages are installed without what they depend on. Raises RuntimeError when it cannot be made.
    """
    home = PEERS / name
    python = home / "bin" / "python"
    done = home / "complete"
    if done.exists():
        return python
    say(f"installing {', '.join([*bare, *packages])} into {home.relative_to(ROOT)}")
    shutil.rmtree(home, ignore_errors=True)
    uv = _uv()
    commands = [[uv, "venv", "--quiet", "--python", sys.executable, str(home)]]
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    commands.append([*install, *packages])
    if bare:
        commands.append([*install, "--no-deps", *bare])
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"cannot install {name}: {result.stderr.strip()[-500:]}")
    done.touch()
    return python


def dynamo_environment() -> Path:
    """The Python of Dynamo's environment. Raises RuntimeError when it cannot be had."""
    bare = [f"ai-dynamo=={DYNAMO}", f"ai-dynamo-runtime=={DYNAMO}"]
    return environment(f"dynamo-{DYNAMO}", _DYNAMO_NEEDS, bare=bare)


def lmcache_environment() -> Path:
    """The Python of LMCache's environment. Raises RuntimeError when it cannot be had."""
    return environment(f"lmcache-{LMCACHE}", [f"lmcache=={LMCACHE}"])


def mooncake_environment() -> tuple[Path, dict[str, str]]:
    """The Python of Mooncake's environment, and what its processes need beside ours.

    Raises RuntimeError when it cannot be had.
    """
    # It loads the library of InfiniBand's verbs to speak TCP, too; NIXL's wheel carries one, by another name.
    packages = [f"mooncake-transfer-engine-non-cuda=={MOONCAKE}", "numpy"]
    python = environment(f"mooncake-{MOONCAKE}", packages, bare=[f"nixl-cu12=={version('nixl')}"])
    home = python.parents[1]
    carried = next(home.glob("lib/python*/site-packages/nixl_cu12.libs/libibverbs-*"))
    named = home / "lib" / "verbs" / "libibverbs.so.1"
    named.parent.mkdir(exist_ok=True)
    if not named.exists():
        named.symlink_to(carried)
    return python, {"LD_LIBRARY_PATH": f"{named.parent}:{carried.parent}"}


def _uv() -> str:
    own = sorted((ROOT / ".cache").glob("uv-*/bin/uv"))
    found = str(own[-1]) if own else shutil.which("uv")
    if found is None:
        raise RuntimeError("uv is missing: run `make install`")
    return found
