"""The chains of blocks that a store holds, for those who look at it."""

from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from tiers.entry import Provenance
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.record import SCOPE_BYTES

_AT_ONCE = 256
_MOST_BLOCKS = 8192
"""Beyond the hottest blocks, chains are shown as far as these reach."""
_TOKEN_BYTES = 4


class StoredChain(NamedTuple):
    """A beginning of prompts that is stored, in numbers."""

    key: str
    """Of its last block, in hexadecimal."""
    blocks: int
    tokens: int
    size: int
    """Bytes of its blocks, which other chains may have, too."""
    labels: tuple[str, ...]
    priority: float
    """Of its last block."""
    expires_at: float
    """Unix seconds."""


def hottest_chains(
    index: PrefixIndex, most: int, labels: Collection[str] = ()
) -> list[StoredChain]:
    """Return the chains that are evicted last, the hottest first; with labels, those with one.

    Raises:
        lmdb.Error: the index can't be read.
    """
    keys = [key for key, _ in islice(index.hottest([b""]), _MOST_BLOCKS)]
    last: dict[bytes, tuple[str, ...]] = {}
    parents: set[bytes] = set()
    for at in range(0, len(keys), _AT_ONCE):
        for key, (block, details) in index.described(keys[at : at + _AT_ONCE]).items():
            last[key] = Provenance(0, block.labels).labels
            if details.parent:
                parents.add(key[:SCOPE_BYTES] + details.parent)
    wanted = (
        (key, own)
        for key, own in last.items()
        if key not in parents and not (labels and set(own).isdisjoint(labels))
    )
    chains = (_chain(index, key, own) for key, own in wanted)
    return [*islice((chain for chain in chains if chain is not None), most)]


def _chain(index: PrefixIndex, key: bytes, labels: tuple[str, ...]) -> StoredChain | None:
    blocks = index.chain_to(key)
    if blocks is None:
        return None
    return StoredChain(
        key.hex(),
        len(blocks),
        sum(len(details.tokens) // _TOKEN_BYTES for _, details in blocks),
        sum(block.size for block, _ in blocks),
        labels,
        blocks[-1][0].priority,
        min(block.expires_at for block, _ in blocks),
    )
