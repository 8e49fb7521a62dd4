"""Keys: a digest, which may follow a scope and a dot.

Each scope is entitled to an equal share of a tier: an entry is evicted only if its scope holds at
least an equal part of what all scopes hold. An entry without a scope may always be evicted.
"""

import re
from base64 import b32encode
from hashlib import blake2b
from struct import Struct

SCOPE_LENGTH = 8
DOT = "."

KEY_PATTERN = "(?:[a-z2-7]{8}[.])?[0-9a-f]{64}"
"""Matches what `digest` returns, alone or in a scope."""
is_key = re.compile(KEY_PATTERN).fullmatch
"""Returns a match if a text is such a key."""

_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz234567")
"""Base 32 (RFC 4648), in lower case."""
_LENGTH = Struct(">Q").pack


def digest(*parts: bytes) -> str:
    """Return the key of `parts`: 64 hexadecimal digits of BLAKE2b-256 (RFC 7693).

    Each part is preceded by its length, so different lists of parts have different digests.
    """
    state = blake2b(digest_size=32)
    for part in parts:
        state.update(_LENGTH(len(part)))
        state.update(part)
    return state.hexdigest()


def scope_named(name: bytes) -> str:
    """Return the scope of that name.

    It has 40 bits, as many as the disk tier's rows have room for. Two names that collide share one
    scope.
    """
    return b32encode(blake2b(name, digest_size=5).digest()).decode().lower()


def scoped(scope: str, key: str) -> str:
    """Return `key` in `scope`, or `key` itself if `scope` is empty."""
    return f"{scope}{DOT}{key}" if scope else key


def scope_of(key: str) -> str:
    """Return a key's scope, or an empty text if it has none."""
    if key[SCOPE_LENGTH : SCOPE_LENGTH + 1] != DOT:
        return ""
    scope = key[:SCOPE_LENGTH]
    return scope if _ALPHABET.issuperset(scope) else ""
