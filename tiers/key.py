"""Keys: what an entry is found by, and whose it is.

A key may begin with its scope and a dot. Of the room in a tier each scope has an equal part for
sure: for room an entry leaves only if its scope holds at least that part of what all scopes hold.
An entry without a scope is nobody's, and may leave for everybody.
"""

import re
from base64 import b32encode
from hashlib import blake2b
from struct import Struct

SCOPE_LENGTH = 8
DOT = "."

KEY_PATTERN = "(?:[a-z2-7]{8}[.])?[0-9a-f]{64}"
"""What `digest` may have returned, and such a key in a scope."""
is_key = re.compile(KEY_PATTERN).fullmatch
"""Tells whether a text is such a key."""

_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz234567")
"""Of base 32 (RFC 4648)."""
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


def scope_named(name: bytes) -> str:
    """Return the scope of that name.

    It has 40 bits, as many as rows of the disk tier have room for: should two be alike, they share
    one part.
    """
    return b32encode(blake2b(name, digest_size=5).digest()).decode().lower()


def scoped(scope: str, key: str) -> str:
    """Return `key` in a scope, if it isn't empty."""
    return f"{scope}{DOT}{key}" if scope else key


def scope_of(key: str) -> str:
    """Return a key's scope, which is empty if it has none."""
    if key[SCOPE_LENGTH : SCOPE_LENGTH + 1] != DOT:
        return ""
    scope = key[:SCOPE_LENGTH]
    return scope if _ALPHABET.issuperset(scope) else ""
