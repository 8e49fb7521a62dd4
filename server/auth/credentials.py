"""API keys: made once, known afterwards by their SHA-256 alone, which is what files hold.

A fast hash without salt is right for them, unlike for passwords: a key of ours has 256 bits of
chance, so nobody finds it by trying (RFC 6750, section 5.2, has tokens be unguessable too).
"""

from collections.abc import Sequence

from multidict import MultiMapping, istr

from server.protocol.errors import BadRequestError

AUTHORIZATION = istr("Authorization")
X_API_KEY = istr("x-api-key")
"""Where Anthropic's clients send their key."""
_NONE: Sequence[str] = ()


def presented_credentials(headers: MultiMapping[str]) -> str:
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


def bearer_key(credentials: str) -> str:
    """Return the key in what `presented` returned; empty if it holds none (RFC 6750)."""
    scheme, _, key = credentials.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
