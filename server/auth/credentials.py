"""The credentials in a request's headers: OpenAI's bearer token, or Anthropic's `x-api-key`."""

from collections.abc import Sequence

from multidict import MultiMapping, istr

AUTHORIZATION = istr("Authorization")
X_API_KEY = istr("x-api-key")
"""The header in which Anthropic's clients send their key."""
_NONE: Sequence[str] = ()


class DuplicateHeaderError(ValueError):
    """A header with credentials stands more than once. An engine may take another one than we do.

    Args:
        header: its name.
        times: how often it stands.
    """

    def __init__(self, header: str, times: int) -> None:
        super().__init__(f"The header {header} should stand once, and stands {times} times.")
        self.header = header


def presented_credentials(headers: MultiMapping[str]) -> str:
    """Return the credentials of a request as a value of `Authorization`; empty if it has none.

    Raises:
        DuplicateHeaderError: one of the headers stands more than once.
    """
    token, key = credentials_in(headers)
    if token is None and key is not None:
        return f"Bearer {key}"
    return token or ""


def credentials_in(headers: MultiMapping[str]) -> tuple[str | None, str | None]:
    """Return the values of `Authorization` and `x-api-key`; `None` for a header that is missing.

    Raises:
        DuplicateHeaderError: one of them stands more than once.
    """
    tokens, keys = headers.getall(AUTHORIZATION, _NONE), headers.getall(X_API_KEY, _NONE)
    if len(tokens) > 1:
        raise DuplicateHeaderError(AUTHORIZATION, len(tokens))
    if len(keys) > 1:
        raise DuplicateHeaderError(X_API_KEY, len(keys))
    return tokens[0] if tokens else None, keys[0] if keys else None


def bearer_key(credentials: str) -> str:
    """Return the key in a value of `Authorization`; empty if it holds none (RFC 6750)."""
    scheme, _, key = credentials.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
