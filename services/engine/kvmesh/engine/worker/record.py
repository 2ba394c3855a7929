"""What a worker knows of its engine's cached blocks: the truth that routers' indexes copy."""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent


class BlockRecord:
    """The set of blocks on the device, each with its parent."""

    def __init__(self) -> None:
        self._parents: dict[int, int | None] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, block: int) -> bool:
        return block in self._parents

    def apply(self, event: KvEvent) -> None:
        parents = self._parents
        match event:
            case BlocksStored(hashes, parent):
                for block in hashes:
                    parents[block] = parent
                    parent = block
            case BlocksRemoved(hashes):
                for block in hashes:
                    parents.pop(block, None)
            case BlocksCleared():
                parents.clear()

    def chains(self) -> Iterator[BlocksStored]:
        """The set of this moment as runs of blocks; later changes do not show."""
        return _runs(self._parents.copy())


def _runs(parents: dict[int, int | None]) -> Iterator[BlocksStored]:
    run: list[int] = []
    root: int | None = None
    for block, parent in parents.items():
        # Blocks stored together lie together.
        if run and parent == run[-1]:
            run.append(block)
            continue
        if run:
            yield BlocksStored(run, root)
        run, root = [block], parent
    if run:
        yield BlocksStored(run, root)
