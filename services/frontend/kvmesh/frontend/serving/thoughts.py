"""What a model has thought or noted, in the opaque strings that clients give back with a conversation.

Nothing is secret in them: whoever holds one may know what it says. They are for clients that carry a
conversation without showing all of it.
"""

from __future__ import annotations

import base64
import hashlib
import zlib

_MARK = b"kvmesh1:"
# Bytes that a string may unfold to.
_LONGEST = 4 << 20


def digest(text: str) -> str:
    """Stands for thoughts that the client has in full."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def seal(text: str) -> str:
    """Carries the thoughts."""
    return base64.b64encode(_MARK + zlib.compress(text.encode())).decode()


def unseal(sealed: str) -> str | None:
    """The thoughts; None for what was not made by `seal`."""
    try:
        data = base64.b64decode(sealed, validate=True)
        if not data.startswith(_MARK):
            return None
        return zlib.decompressobj().decompress(data[len(_MARK) :], _LONGEST).decode()
    except (ValueError, zlib.error):
        return None
