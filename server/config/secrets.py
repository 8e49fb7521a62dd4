"""The key with which is encrypted what is at rest, as people write it."""

import re
import secrets
from base64 import b64decode
from hashlib import sha256
from typing import Annotated

from pydantic import AfterValidator

from tiers.disk import KEY_BYTES


def parse_cipher_key(given: str) -> bytes:
    """Return the 32 bytes that are written in hexadecimal or base64.

    Raises:
        ValueError: they aren't.
    """
    text = given.strip()
    try:
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"should be {KEY_BYTES} bytes in hexadecimal or base64")
    return key


def _checked(given: str) -> str:
    parse_cipher_key(given)
    return given


CipherKey = Annotated[str, AfterValidator(_checked)]
"""A field that holds a key for encryption, which nobody shows."""


_PREFIX = "sha256:"


_is_hash = re.compile(_PREFIX + "[0-9a-f]{64}").fullmatch


# By far too many to try, if they are by chance.
_SHORTEST = 16


def new_key() -> str:
    """Return a new key."""
    return f"ts-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """Return what a key is known by: `sha256:` and 64 hexadecimal digits."""
    return _PREFIX + sha256(key.encode(errors="surrogateescape")).hexdigest()


def _as_hash(given: str) -> str:
    if not _is_hash(given):
        raise ValueError("should be sha256: and 64 hexadecimal digits, as tierserve keys new says")
    return given


def _hash_of(given: str) -> str:
    if given.startswith(_PREFIX):
        return _as_hash(given)
    if len(given) < _SHORTEST or not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError(f"should have at least {_SHORTEST} characters of ASCII, and no spaces")
    return hash_key(given)


Hash = Annotated[str, AfterValidator(_as_hash)]
"""A field that holds a key's hash."""


KeyOrHash = Annotated[str, AfterValidator(_hash_of)]
"""A field that is given a key or its hash, and holds the hash."""
