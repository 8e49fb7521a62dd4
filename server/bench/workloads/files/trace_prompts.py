"""Prompts of traces that have only token counts and the ids of blocks: real text in their place.

Equal blocks have equal text, so prompts begin alike exactly where those of the trace did, and as
many tokens are as many words.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

from pydantic import Field

from server.bench.workloads.base import Options
from server.bench.workloads.texts import words

LEAST_WORDS = 8
"""Of a block and of a prompt: fewer could be equal by chance."""


class TraceOptions(Options):
    """How a trace is made smaller, for small models."""

    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """By what lengths are multiplied: of answers, prompts, and each block alike, so that what was
    shared stays shared."""
    max_prompt_tokens: Annotated[int, Field(ge=2 * LEAST_WORDS)] | None = None
    """Longer prompts are cut, but for a few words at their end that tell different ones apart."""


def block_prompt(
    seed: int,
    blocks: Sequence[object],
    block_words: int,
    tokens: int,
    rest: object,
    options: TraceOptions,
) -> str:
    """Return a prompt of so many words.

    Args:
        seed: decides the words.
        blocks: ids of the blocks that it begins with.
        block_words: of each block.
        tokens: of the whole prompt, scaled already.
        rest: stands for the whole prompt; decides what comes after the blocks.
        options: may cut it.
    """
    count, most = max(tokens, LEAST_WORDS), options.max_prompt_tokens
    left = count if most is None or count <= most else most - LEAST_WORDS
    texts = []
    for block in blocks:
        if not left:
            break
        used = min(block_words, left)
        texts.append(_block_text(seed, block, used))
        left -= used
    if most is not None and count > most:
        left += LEAST_WORDS
    if left:
        texts.append(words(seed, ("rest", rest), left))
    return " ".join(texts)


# Blocks that are shared come soon again.
@lru_cache(1024)
def _block_text(seed: int, block: object, count: int) -> str:
    return words(seed, ("block", block), count)
