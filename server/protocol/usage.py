"""The token counts that an answer tells of itself, read without parsing it."""

import re

from tiers import Answer

# They stand at the end of a body.
_TAIL_BYTES = 512
# Responses and Messages use the second names.
_OUTPUT = (b'"completion_tokens":', b'"output_tokens":')
_INPUT = (b'"prompt_tokens":', b'"input_tokens":')
# Messages don't count these among those.
_BESIDE = (b'"cache_read_input_tokens":', b'"cache_creation_input_tokens":')
_REUSED = (b'"cached_tokens":', b'"cache_read_input_tokens":')
# vLLM writes no space before it; what passes through may be of another engine.
_number = re.compile(rb" ?(\d{1,9})").match


def counts_in(answer: Answer) -> bytes:
    """Return the part of an answer that tells its token counts."""
    return answer.trailer or answer.content[-_TAIL_BYTES:]


def output_tokens(answer: Answer) -> int | None:
    """Return how many tokens were generated, where that is told."""
    return _last(answer.trailer or answer.content, _OUTPUT)


def output_tokens_in(counts: bytes) -> int | None:
    """Return how many tokens were generated, by what `counts_in` gives."""
    return _last(counts, _OUTPUT)


def input_tokens(answer: Answer) -> int | None:
    """Return how many tokens the prompt has, where that is told."""
    return input_tokens_in(answer.trailer or answer.content)


def input_tokens_in(counts: bytes) -> int | None:
    """Return how many tokens the prompt has, by the end of an answer."""
    tokens = _last(counts, _INPUT)
    if tokens is None:
        return None
    return tokens + sum(_last(counts, (name,)) or 0 for name in _BESIDE)


def reused_tokens_in(counts: bytes) -> int | None:
    """Return how many of them the engine found in its prefix cache, by the end of an answer."""
    return _last(counts, _REUSED)


def _last(counts: bytes, names: tuple[bytes, ...]) -> int | None:
    # A stream of Messages begins with a count of none.
    for name in names:
        at = counts.rfind(name, -_TAIL_BYTES)
        if at >= 0 and (found := _number(counts, at + len(name))) is not None:
            return int(found[1])
    return None
