"""An engine's own prefix cache, as vLLM's block pool has it, and the prompts that reach it.

Requests come one after the other. A request takes the cached blocks of its prompt's beginning, and
for the rest of its tokens free blocks: those that hold nothing, or else the cached ones that are
free for the longest time. When it ends, its full blocks stay cached, and the last of them are
evicted first, since they are useless without the beginning.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from server.simulation.traces import Trace, TracePrompt


def engine_prompts(trace: Trace, answered_by: Sequence[int], tiers: int) -> Iterator[TracePrompt]:
    """Yield the prompts that reach the engine: those that no tier answers.

    Args:
        trace: of the requests.
        answered_by: for each of its requests, the tier that answered, or `tiers`.
        tiers: the number of tiers.
    """
    bypassed = iter([*trace.bypassed, (len(trace.requests), None)])
    before, prompt = next(bypassed)
    for position, (request, tier) in enumerate(zip(trace.requests, answered_by, strict=True)):
        while prompt is not None and before <= position:
            yield prompt
            before, prompt = next(bypassed)
        if tier == tiers and (missed := trace.prompts.get(request.key)) is not None:
            yield missed._replace(at_s=request.at_s)
    while prompt is not None:
        yield prompt
        before, prompt = next(bypassed)


def reusable(prompt: TracePrompt, block_tokens: int) -> int:
    """Return how many of a prompt's blocks may be reused: at least one token must be computed."""
    return min(len(prompt.blocks), (prompt.tokens - 1) // block_tokens)


def taken_blocks(prompt: TracePrompt, block_tokens: int) -> int:
    """Return how many blocks a request takes in the end; its last token is never stored."""
    return -(-(prompt.tokens + max(prompt.output_tokens - 1, 0)) // block_tokens)


class EngineCache:
    """The cache of an engine.

    Args:
        blocks: that its memory holds.
        block_tokens: tokens of a block.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._empty = blocks
        # Blocks by number; those of output, which no prompt asks for, by unique numbers below 0.
        # The first is evicted first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._outputs = 0

    def ask(self, prompt: TracePrompt) -> int:
        """Serve a prompt that fits; returns how many blocks of it were cached."""
        cached, keys = self._cached, prompt.blocks
        most = reusable(prompt, self._block_tokens)
        hits = next((at for at in range(most) if keys[at] not in cached), most)
        for key in keys[:hits]:
            del cached[key]
        taken = taken_blocks(prompt, self._block_tokens) - hits
        for _ in range(taken - self._empty):
            cached.popitem(last=False)
        full = (prompt.tokens + max(prompt.output_tokens - 1, 0)) // self._block_tokens
        outputs = max(full - len(keys), 0)
        kept = [*keys, *range(-self._outputs - outputs, -self._outputs)]
        self._outputs += outputs
        self._empty = max(self._empty - taken, 0) + taken + hits - len(kept)
        for key in reversed(kept):
            if key in cached:
                # Another request left the same block behind; the engine would hold it twice.
                del cached[key]
                self._empty += 1
            cached[key] = None
        return hits
