"""API keys: made once, known afterwards by their SHA-256 alone, which is what files hold.

A fast hash without salt is right for them, unlike for passwords: a key of ours has 256 bits of
chance, so nobody finds it by trying (RFC 6750, section 5.2, has tokens be unguessable too).
"""

import re
import secrets
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated

from multidict import MultiMapping, istr
from pydantic import AfterValidator

from server.protocol.cache_field import BadRequestError

AUTHORIZATION = istr("Authorization")
X_API_KEY = istr("x-api-key")
"""Where Anthropic's clients send their key."""
_PREFIX = "sha256:"
_is_hash = re.compile(_PREFIX + "[0-9a-f]{64}").fullmatch
# By far too many to try, if they are by chance.
_SHORTEST = 16
_NONE: Sequence[str] = ()


def new_key() -> str:
    """Return a new key."""
    return f"ts-{secrets.token_urlsafe(32)}"


def hashed(key: str) -> str:
    """Return what a key is known by: `sha256:` and 64 hexadecimal digits."""
    return _PREFIX + sha256(key.encode(errors="surrogateescape")).hexdigest()


def presented(headers: MultiMapping[str]) -> str:
    """Return the credentials of a request as a value of `Authorization`; empty if it has none.

    Raises:
        BadRequestError: one of the headers stands twice.
    """
    token, key = credentials_in(headers)
    if token is None and key is not None:
        return f"Bearer {key}"
    return token or ""


def credentials_in(headers: MultiMapping[str]) -> tuple[str | None, str | None]:
    """Return what `Authorization` and `x-api-key` say.

    Raises:
        BadRequestError: one of them stands twice, of which an engine may take another than we do.
    """
    tokens, keys = headers.getall(AUTHORIZATION, _NONE), headers.getall(X_API_KEY, _NONE)
    if len(tokens) > 1 or len(keys) > 1:
        name, values = (AUTHORIZATION, tokens) if len(tokens) > 1 else (X_API_KEY, keys)
        text = f"The header {name} should stand once, and stands {len(values)} times."
        raise BadRequestError(text, name)
    return tokens[0] if tokens else None, keys[0] if keys else None


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
