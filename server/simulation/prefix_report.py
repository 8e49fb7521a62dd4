"""Prefix reuse: how much of each prompt a cache of prefix blocks would hold, by trace.

A model of vLLM's prefix cache, not a tier: only the leading run of blocks that are in is reused,
and of a prompt the last blocks leave first.
"""

from dataclasses import dataclass

from server.simulation.traces import BLOCK_TOKENS, Trace
from tiers.policies import LRU, POLICIES

SHARES = (0.01, 0.1, 1.0)
"""Sizes of the cache, of all different blocks of the trace."""


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """What a cache of `max_blocks` under a policy reused."""

    policy: str
    max_blocks: int
    blocks: int
    """Those of all prompts."""
    reused: int
    reuse_ratio: float
    tokens_saved: int
    """Of prompts, that weren't computed again."""


def measure(trace: Trace, policies: tuple[str, ...]) -> list[PrefixReuse]:
    """Replay a trace's prefix blocks against caches of several sizes; nothing where it has none."""
    different = len({block for request in trace.requests for block in request.blocks})
    if not different:
        return []
    return [
        reuse(trace, policy, max(1, round(share * different)))
        for policy in dict.fromkeys((LRU.NAME, *policies))
        for share in SHARES
    ]


def reuse(trace: Trace, name: str, max_blocks: int) -> PrefixReuse:
    """Replay a trace's prefix blocks against an empty cache of `max_blocks`."""
    policy = POLICIES[name](max_blocks)
    held: set[str] = set()
    blocks = reused = 0
    for request in trace.requests:
        keys = [str(block) for block in request.blocks]
        blocks += len(keys)
        reused += next((run for run, key in enumerate(keys) if key not in held), len(keys))
        # As vLLM frees them: the end of a prompt is of no use without its beginning.
        for key in reversed(keys):
            if key in held:
                policy.access(key)
                continue
            policy.insert(key, 1)
            held.add(key)
            if len(held) > max_blocks:
                held.remove(policy.evict())
    return PrefixReuse(name, max_blocks, blocks, reused, reused / blocks, reused * BLOCK_TOKENS)
