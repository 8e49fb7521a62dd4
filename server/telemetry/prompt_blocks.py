"""The blocks of a prompt in the trace: by them a simulation finds prompts that begin alike.

The front has no tokenizer, so a block is a piece of the prompt's text. Its digest is of all text up
to its end, of the model and of the salt that keeps tenants apart in the engine. So equal digests
mean equal beginnings that an engine can reuse.

The digests are keyed, and the key is random and stays here, in a file beside the trace. So a trace
may be given away: unlike the digest of a whole request, a digest of a piece could be found by
guessing one piece after the other. Since the key is kept, digests stay comparable when the trace
begins a new file and when the server starts again.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from server.protocol.request import ParsedRequest
from server.telemetry.prompt_text import prompt_fields, prompt_parts

BLOCK_CHARACTERS = 1024
"""About 256 tokens of English."""
_MAX_BLOCKS = 256
_PARSED_BYTES = 512 * 1024
"""Far more than the blocks take; to parse and hash so much takes a few milliseconds."""
_KEY_BYTES = 32
_STATE_BYTES, _DIGEST_BYTES = 16, 6


class PromptBlocks(NamedTuple):
    """A prompt as blocks."""

    digests: tuple[str, ...]
    """Of its full blocks, in hexadecimal; of a very long prompt only the first."""
    characters: int | None
    """Of the whole prompt, if all of it was looked at."""


def prompt_blocks(request: ParsedRequest, key: bytes) -> PromptBlocks:
    """Return the blocks of a request's prompt; none if its body is nested too deeply."""
    try:
        fields = prompt_fields(request, _PARSED_BYTES)
    except ValueError:
        return PromptBlocks((), None)
    text = "".join(prompt_parts(fields))
    head = [request.model, str(fields.get("cache_salt") or "")]
    digests = tuple(_digests("\0".join(head), text[: BLOCK_CHARACTERS * _MAX_BLOCKS], key))
    return PromptBlocks(digests, len(text) if len(request.raw) <= _PARSED_BYTES else None)


def load_key(path: Path) -> bytes:
    """Return the key in a file, which is made if there is none.

    Raises:
        OSError: it can't be read or made.
    """
    with suppress(FileNotFoundError):
        if len(key := path.read_bytes()) == _KEY_BYTES:
            return key
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "r+b", buffering=0) as target:
        # Of several processes that find none, one makes it.
        fcntl.flock(target, fcntl.LOCK_EX)
        if len(key := target.read()) != _KEY_BYTES:
            key = secrets.token_bytes(_KEY_BYTES)
            target.truncate(0)
            os.pwrite(file, key, 0)
    return key


def _digests(head: str, text: str, key: bytes) -> Iterator[str]:
    state = blake2b(_bytes(head), key=key, digest_size=_STATE_BYTES).digest()
    for end in range(BLOCK_CHARACTERS, len(text) + 1, BLOCK_CHARACTERS):
        piece = _bytes(text[end - BLOCK_CHARACTERS : end])
        state = blake2b(state + piece, key=key, digest_size=_STATE_BYTES).digest()
        yield state[:_DIGEST_BYTES].hex()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
