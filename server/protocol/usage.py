"""Token counts of answers, read without parsing them."""

import re
from typing import Any

from tiers import Answer
from tiers.prefix_kv.options import DISK_TOKENS

# The counts stand at the end of a body.
_TAIL_BYTES = 512
# Responses and Messages use the second names.
_OUTPUT = (b'"completion_tokens":', b'"output_tokens":')
_INPUT = (b'"prompt_tokens":', b'"input_tokens":')
# In Messages, these aren't part of `input_tokens`.
_BESIDE = (b'"cache_read_input_tokens":', b'"cache_creation_input_tokens":')
_REUSED = (b'"cached_tokens":', b'"cache_read_input_tokens":')
_TRANSFER = "kv_transfer_params"
# vLLM writes no space before a number; other engines may.
_number = re.compile(rb" ?(\d{1,9})").match


def counts_in(answer: Answer) -> bytes:
    """Return the part of an answer that holds its token counts."""
    return answer.trailer or answer.content[-_TAIL_BYTES:]


def output_tokens(answer: Answer) -> int | None:
    """Return how many tokens were generated; `None` if the answer has no count."""
    return _last(answer.trailer or answer.content, _OUTPUT)


def output_tokens_in(counts: bytes) -> int | None:
    """Return how many tokens were generated, read from what `counts_in` returns."""
    return _last(counts, _OUTPUT)


def input_tokens(answer: Answer) -> int | None:
    """Return how many tokens the prompt has; `None` if the answer has no count."""
    return input_tokens_in(answer.trailer or answer.content)


def input_tokens_in(counts: bytes) -> int | None:
    """Return how many tokens the prompt has, read from what `counts_in` returns."""
    tokens = _last(counts, _INPUT)
    if tokens is None:
        return None
    return tokens + sum(_last(counts, (name,)) or 0 for name in _BESIDE)


def reused_tokens_in(counts: bytes) -> int | None:
    """Return how many of the prompt's tokens the engine found in its prefix cache."""
    return _last(counts, _REUSED)


def take_disk_tokens(body: dict[str, Any]) -> int:
    """Remove from an answer what our connector says in it, as if it had said nothing.

    Returns the tokens of the prompt that the engine took from the prefix tier; 0 if it doesn't say.
    """
    reported = body.get(_TRANSFER)
    tokens = reported.get(DISK_TOKENS) if isinstance(reported, dict) else None
    if not isinstance(tokens, int):
        return 0
    body[_TRANSFER] = None
    return tokens


def _last(counts: bytes, names: tuple[bytes, ...]) -> int | None:
    # The last one counts: a stream of Messages begins with a count of 0.
    for name in names:
        at = counts.rfind(name, -_TAIL_BYTES)
        if at >= 0 and (found := _number(counts, at + len(name))) is not None:
            return int(found[1])
    return None
