"""What other policies would do in the prefix tier's place, in as many blocks.

LRU stores every block at once, and evicts leaves first. The optimum knows the future: no tier of
that size can load more blocks.
"""

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heappop, heappush

from server.simulation.prefix_tier import EngineRequest, PrefixModel, wanted


def replay_lru(
    requests: Sequence[EngineRequest], model: PrefixModel, max_blocks: int
) -> tuple[list[int], int]:
    """Return how many blocks LRU loads for each request, and how many it stores."""
    held: OrderedDict[int, None] = OrderedDict()
    loaded, stored = [], 0
    for prompt, computed in requests:
        missing = wanted(prompt, computed, model.block_tokens)
        run = next((at for at, block in enumerate(missing) if block not in held), len(missing))
        loaded.append(run if run * model.block_tokens >= model.min_tokens else 0)
        for block in reversed(prompt.blocks):
            stored += block not in held
            held[block] = None
            held.move_to_end(block)
            if len(held) > max_blocks:
                held.popitem(last=False)
    return loaded, stored


def replay_optimum(
    requests: Sequence[EngineRequest], model: PrefixModel, max_blocks: int
) -> list[int]:
    """Return an upper bound of the blocks that can be loaded for each request.

    A block can be stored whenever it is in the engine, and pays when it is wanted next, if it isn't
    in the engine before that. So of these times between two requests for a block, as many as
    possible are chosen of which no more than `max_blocks` overlap: the one that lasts longest is
    given up (Belady). Each block counts alone, without its beginning and without a least load.
    """
    pays_at = _pays_at(requests, model.block_tokens)
    held: dict[int, int] = {}
    farthest: list[tuple[int, int, int]] = []
    loaded = []
    for (prompt, computed), following in zip(requests, pays_at, strict=True):
        missing = wanted(prompt, computed, model.block_tokens)
        loaded.append(sum(block in held for block in missing))
        for depth, (block, at) in enumerate(zip(prompt.blocks, following, strict=True)):
            held.pop(block, None)
            if at is not None:
                held[block] = at
                # Of equals, leaves go first.
                heappush(farthest, (-at, -depth, block))
        while len(held) > max_blocks:
            at, _, block = heappop(farthest)
            if held.get(block) == -at:
                del held[block]
    return loaded


def _pays_at(requests: Sequence[EngineRequest], block_tokens: int) -> list[list[int | None]]:
    """Return for each block of each request at which request it would be loaded, if at any."""
    next_at: dict[int, int | None] = {}
    pays: list[list[int | None]] = []
    for number in range(len(requests) - 1, -1, -1):
        prompt, computed = requests[number]
        pays.append([next_at.get(block) for block in prompt.blocks])
        next_at |= dict.fromkeys(prompt.blocks)
        next_at |= dict.fromkeys(wanted(prompt, computed, block_tokens), number)
    return pays[::-1]
