"""Keys: what an entry is found by."""

import re
from hashlib import blake2b
from struct import Struct

is_key = re.compile("[0-9a-f]{64}").fullmatch
"""Tells what `digest` may have returned."""

_LENGTH = Struct(">Q").pack


def digest(*parts: bytes) -> str:
    """Return the key of `parts`: 64 hexadecimal digits of BLAKE2b-256 (RFC 7693).

    Each part is preceded by its length, so no two different lists of parts are hashed alike.
    """
    state = blake2b(digest_size=32)
    for part in parts:
        state.update(_LENGTH(len(part)))
        state.update(part)
    return state.hexdigest()
