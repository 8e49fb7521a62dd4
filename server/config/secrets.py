"""Fields that hold secrets: the disk tier's encryption key, and clients' keys or their hashes."""

import re
import secrets
from base64 import b64decode
from hashlib import sha256
from typing import Annotated

from pydantic import AfterValidator

from tiers.disk import KEY_BYTES


def parse_cipher_key(text: str) -> bytes:
    """Return the 32 bytes of a key in hexadecimal or base64.

    Raises:
        ValueError: it is neither, or of another length.
    """
    text = text.strip()
    try:
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"should be {KEY_BYTES} bytes in hexadecimal or base64")
    return key


def _check_cipher_key(key: str) -> str:
    parse_cipher_key(key)
    return key


CipherKey = Annotated[str, AfterValidator(_check_cipher_key)]
"""Type of a field that holds an encryption key."""

_PREFIX = "sha256:"
_is_hash = re.compile(_PREFIX + "[0-9a-f]{64}").fullmatch
# Too long to guess, if the characters are random.
_SHORTEST = 16


def new_key() -> str:
    """Return a new random key for a client."""
    return f"ts-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """Return the hash of a key: `sha256:` and 64 hexadecimal digits."""
    return _PREFIX + sha256(key.encode(errors="surrogateescape")).hexdigest()


def _check_hash(text: str) -> str:
    if not _is_hash(text):
        raise ValueError(
            "should be sha256: and 64 hexadecimal digits, as tierserve keys new prints it"
        )
    return text


def _hash_of(key: str) -> str:
    if key.startswith(_PREFIX):
        return _check_hash(key)
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"should have at least {_SHORTEST} characters of ASCII, and no spaces")
    return hash_key(key)


Hash = Annotated[str, AfterValidator(_check_hash)]
"""Type of a field that holds a key's hash."""
KeyOrHash = Annotated[str, AfterValidator(_hash_of)]
"""Type of a field that takes a key or its hash, and holds the hash."""
