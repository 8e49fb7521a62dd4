"""The beginnings of a request's prompt as digests: by them an upstream is chosen.

All processes and all replicas of one configuration find the same digests: their key comes from the
configuration. Prompts of other models, adapters and cache salts have others, as in vLLM. A session
that the request names stands for all beginnings.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from multidict import istr

from server.protocol.request import ParsedRequest
from server.telemetry.prompt_text import prompt_fields, prompt_parts, prompt_pieces

SESSION_HEADER = istr("X-Session-Id")
_SESSION_FIELD = "prompt_cache_key"
_PARSED_BYTES = 32 * 1024
# An engine gains little by a shorter one, about 64 tokens, and short system prompts are common.
_LEAST_CHARACTERS = 256
_DIGEST_BYTES = 8


class PromptBeginnings(NamedTuple):
    """The beginnings of a prompt, shortest first; none if it has no text."""

    digests: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    """How many characters each has; none for a session."""


NO_BEGINNINGS = PromptBeginnings()


def digest_of(text: str, key: bytes) -> int:
    """Return the digest of a text, of 8 bytes as a number.

    Args:
        text: what is digested.
        key: of at most 64 bytes.
    """
    digest = blake2b(_bytes(text), key=key, digest_size=_DIGEST_BYTES).digest()
    return int.from_bytes(digest)


def beginnings_of(
    request: ParsedRequest, headers: Mapping[str, str], key: bytes
) -> PromptBeginnings:
    """Return the beginnings of a request's prompt.

    Args:
        request: whose prompt it is.
        headers: of the request.
        key: of the digests, of at most 64 bytes.
    """
    try:
        fields = prompt_fields(request, _PARSED_BYTES)
    except ValueError:
        # It is nested too deeply.
        return NO_BEGINNINGS
    of = f"{request.model}\0{fields.get('cache_salt') or ''}\0"
    if SESSION_HEADER in headers:
        return session_in(headers, key)
    session = fields.get(_SESSION_FIELD)
    if isinstance(session, str) and session:
        return PromptBeginnings((digest_of(f"{of}{session}", key),))
    is_whole = len(request.raw) <= _PARSED_BYTES
    state = blake2b(_bytes(of), key=key, digest_size=_DIGEST_BYTES)
    digests, ends = [], []
    for _, piece, end in prompt_pieces([*prompt_parts(fields)], is_whole=is_whole):
        state.update(_bytes(piece))
        digests.append(int.from_bytes(state.digest()))
        ends.append(end)
    short = sum(end < _LEAST_CHARACTERS for end in ends[:-1])
    return PromptBeginnings(tuple(digests[short:]), tuple(ends[short:]))


def session_in(headers: Mapping[str, str], key: bytes) -> PromptBeginnings:
    """Return what stands for the session that headers name, of any model; none if they don't."""
    session = headers.get(SESSION_HEADER)
    return PromptBeginnings((digest_of(session, key),)) if session else NO_BEGINNINGS


def _bytes(text: str) -> bytes:
    # A text may hold lone surrogates.
    return text.encode(errors="surrogatepass")
