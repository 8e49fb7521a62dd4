"""Which prefix blocks are stored, and which are evicted.

A block is stored once its prefix has been requested `store_after` times lately, so prompts that
come once wear no disk. Of stored blocks, the one of the lowest priority is evicted first: the age
of the store at the block's last request, plus how often it was requested lately. The age is the
priority of the last evicted block, so a favourite of the past sinks below what is requested now
(LFU with dynamic aging: Arlitt et al., «Evaluating Content Management Techniques for Web Proxy
Caches», 2000). Counts are the sketch's, which halves them (`tiers.frequency`).

A parent's priority is never below its children's. So leaves leave first, and no chain has a hole.
"""

from collections.abc import Iterator, Sequence
from struct import Struct

from tiers.frequency import FrequencySketch

_ORDER = Struct(">dQIQ")
_DEEPEST = 2**32 - 1
_KEYS_PER_BLOCK = 8
"""Prefixes that the sketch counts for each block that the store has room for."""
_MIN_KEYS, _MAX_KEYS = 2**14, 2**20


def due(counts: Sequence[int], store_after: int) -> int:
    """Return how many of a chain's blocks may be stored, by how often each was requested."""
    return next((at for at, count in enumerate(counts) if count < store_after), len(counts))


def priority(age: float, count: int) -> float:
    """Return the priority of a block that is requested now, for the `count`th time lately."""
    return age + count


def raised(age: float, counts: Sequence[int], held: Sequence[float]) -> Iterator[float]:
    """Yield the new priorities of a chain's blocks that are requested now, last block first.

    Args:
        age: of the store.
        counts: how often each was requested lately.
        held: their priorities until now.
    """
    least = 0.0
    for count, before in zip(reversed(counts), reversed(held), strict=True):
        least = max(least, before, priority(age, count))
        yield least


def order_key(block_priority: float, touch: int, depth: int, sequence: int) -> bytes:
    """Return a key that sorts blocks by which is evicted first; the sequence makes it unique."""
    return _ORDER.pack(block_priority, touch, _DEEPEST - depth, sequence)


def is_order_key(key: bytes) -> bool:
    """Return whether a key has the right length, and so isn't damaged there."""
    return len(key) == _ORDER.size


def depth_of(key: bytes) -> int:
    """Return the depth in an order key."""
    return _DEEPEST - int(_ORDER.unpack(key)[2])


def new_sketch(blocks: int) -> FrequencySketch:
    """Return a sketch for a store that has room for so many blocks."""
    return FrequencySketch(min(max(_KEYS_PER_BLOCK * blocks, _MIN_KEYS), _MAX_KEYS))
