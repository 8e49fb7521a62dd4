"""API keys: made once, known afterwards by their SHA-256 alone, which is what files hold.

A fast hash without salt is right for them, unlike for passwords: a key of ours has 256 bits of
chance, so nobody finds it by trying (RFC 6750, section 5.2, has tokens be unguessable too).
"""

import re
import secrets
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated

from multidict import istr
from pydantic import AfterValidator

AUTHORIZATION = istr("Authorization")
X_API_KEY = istr("x-api-key")
"""Where Anthropic's clients send their key."""
_PREFIX = "sha256:"
_is_hash = re.compile(_PREFIX + "[0-9a-f]{64}").fullmatch
# By far too many to try, if they are by chance.
_SHORTEST = 16


def new_key() -> str:
    """Return a new key."""
    return f"ts-{secrets.token_urlsafe(32)}"


def hashed(key: str) -> str:
    """Return what a key is known by: `sha256:` and 64 hexadecimal digits."""
    return _PREFIX + sha256(key.encode(errors="surrogateescape")).hexdigest()


def presented(headers: Mapping[str, str]) -> str:
    """Return the credentials of a request as a value of `Authorization`; empty if it has none."""
    given = headers.get(AUTHORIZATION)
    if given is not None:
        return given
    key = headers.get(X_API_KEY)
    return "" if key is None else f"Bearer {key}"


def key_in(credentials: str) -> str:
    """Return the key in what `presented` returned; empty if it holds none (RFC 6750)."""
    scheme, _, key = credentials.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _as_hash(given: str) -> str:
    if not _is_hash(given):
        raise ValueError("should be sha256: and 64 hexadecimal digits, as tierserve keys new says")
    return given


def _hash_of(given: str) -> str:
    if given.startswith(_PREFIX):
        return _as_hash(given)
    if len(given) < _SHORTEST or not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError(f"should have at least {_SHORTEST} characters of ASCII, and no spaces")
    return hashed(given)


Hash = Annotated[str, AfterValidator(_as_hash)]
"""A field that holds a key's hash."""
KeyOrHash = Annotated[str, AfterValidator(_hash_of)]
"""A field that is given a key or its hash, and holds the hash."""
