"""The key with which is encrypted what is at rest, as people write it."""

from base64 import b64decode
from typing import Annotated

from pydantic import AfterValidator

from tiers.disk import KEY_BYTES


def cipher_key(given: str) -> bytes:
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
    cipher_key(given)
    return given


CipherKey = Annotated[str, AfterValidator(_checked)]
"""A field that holds a key for encryption, which nobody shows."""
