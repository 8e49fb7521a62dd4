"""Prefix reuse: how much of each prompt a cache of prefix blocks holds.

It models vLLM's prefix cache, not a tier: only the leading run of cached blocks is reused, and a
prompt's last blocks are evicted first.
"""

from dataclasses import dataclass

from server.simulation.traces import BLOCK_TOKENS, Trace
from tiers.policies import LRU, POLICIES

SHARES = (0.01, 0.1, 1.0)
"""Sizes of the cache, as shares of all different blocks of the trace."""


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """The blocks that a cache of `max_blocks` reused under a policy."""

    policy: str
    max_blocks: int
    blocks: int
    """Of all prompts."""
    reused: int
    reuse_ratio: float
    tokens_saved: int
    """Tokens of prompts that need not be computed again."""


def measure(trace: Trace, policies: tuple[str, ...]) -> list[PrefixReuse]:
    """Replay a trace's prefix blocks against caches of several sizes, if it has blocks."""
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
        # vLLM evicts a prompt's end first, since it is useless without the beginning.
        for key in reversed(keys):
            if key in held:
                policy.access(key)
                continue
            policy.insert(key, 1)
            held.add(key)
            if len(held) > max_blocks:
                held.remove(policy.evict())
    return PrefixReuse(name, max_blocks, blocks, reused, reused / blocks, reused * BLOCK_TOKENS)
