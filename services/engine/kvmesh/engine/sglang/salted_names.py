"""The mesh's names of salted blocks.

SGLang 0.5.23 names a salted block differently in its KV events, whose chain the salt alone seeds
(`compute_node_event_hash_values`), and in its storage keys, which the store has (`storage_namespace_seed`).
The mesh goes by the keys, so that a block has one name on every tier: events get it here, from their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.core import event_namespace_seed, namespace_seed, page_digests

_DIGEST = 32


class SaltedNames:
    """Remembers the digest behind each salted event hash, because a chain goes on from it.

    About 200 bytes a salted block of the device pool. Hashes are unsigned, of 64 bits.
    """

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}

    def stored(
        self, hashes: Sequence[int], parent: int | None, tokens: Sequence[int], page_size: int, salt: str
    ) -> tuple[list[int], int | None] | None:
        """The blocks' names and their parent's; None where what came before was lost: then nobody can tell.

        `parent` and the returned parent are None for a chain's first block.
        """
        root = parent is None or parent == _hash(event_namespace_seed(salt))
        before = namespace_seed(cache_salt=salt) if root else self._digests.get(parent or 0)
        if before is None:
            return None
        chain = page_digests(tokens, page_size, before)
        digests = [chain[at : at + _DIGEST] for at in range(0, len(chain), _DIGEST)]
        self._digests.update(zip(hashes, digests, strict=True))
        return [_hash(digest) for digest in digests], None if root else _hash(before)

    def removed(self, hashes: Sequence[int]) -> list[int]:
        """The names of blocks that are gone, salted or not."""
        if not self._digests:
            return list(hashes)
        gone = ((self._digests.pop(hash_, None), hash_) for hash_ in hashes)
        return [hash_ if digest is None else _hash(digest) for digest, hash_ in gone]

    def cleared(self) -> None:
        self._digests.clear()


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
