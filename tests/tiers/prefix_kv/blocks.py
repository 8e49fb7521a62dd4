"""Chains, contents and stores for the tests of the prefix blocks, and what must hold of a store."""

import os
from collections.abc import Collection, Sequence
from hashlib import sha256, shake_128
from itertools import pairwise
from pathlib import Path

from tiers.encryption import TAG_BYTES
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES
from tiers.prefix_kv.index.index_file import INDEX, FileLimits
from tiers.prefix_kv.index.reservations import _extents_of
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import BlockChain, BlockName, StoredBlock
from tiers.prefix_kv.store import Location, PrefixStore, StoreConfig, Stored

SCOPE = b"s" * 16
LARGEST = 5 * PAGE_BYTES
ROOMY = FileLimits(2 * 1024**2, 4096)


def chain_of(
    *path: object, scope: bytes = SCOPE, labels: Sequence[str] = ("model:m",)
) -> BlockChain:
    """Return the chain of a path: of two, the blocks are the same as far as the paths are."""
    names: list[BlockName] = []
    parent = b""
    for step in path:
        tokens = shake_128(f"{step}".encode()).digest(64)
        names.append(BlockName(sha256(parent + tokens).digest(), parent, tokens))
        parent = names[-1].hash
    return BlockChain(scope, names, tuple(labels))


def content_of(chain: BlockChain, at: int, size: int = LARGEST) -> bytes:
    return shake_128(chain.key(at)).digest(size)


def opened(
    folder: Path, limits: FileLimits = ROOMY, key: bytes | None = None, **more
) -> PrefixStore:
    return PrefixStore(StoreConfig(folder, 2**26, key), limits=limits, **more)


def store_chain(
    store: PrefixStore, chain: BlockChain, *, requests: int = 2, size: int = LARGEST, epoch: int = 0
) -> Stored:
    """Store all blocks of a chain."""
    blocks = [
        (NewBlock(chain, at, size, requests, epoch), memoryview(content_of(chain, at, size)))
        for at in range(len(chain.names))
    ]
    return store.write(blocks, memoryview(bytearray(LARGEST + TAG_BYTES)))


def read(store: PrefixStore, block: StoredBlock) -> bytes:
    content = bytearray(block.size)
    scratch = memoryview(bytearray(block.size + TAG_BYTES))
    store.read(Location.of(block), memoryview(content), scratch)
    return bytes(content)


def found(store: PrefixStore, chain: BlockChain) -> int:
    """Return how many blocks of a chain are found; they must have the right bytes."""
    blocks = store.index.lookup(chain)
    for at, block in enumerate(blocks):
        assert read(store, block) == content_of(chain, at, block.size)
    return len(blocks)


def die(store: PrefixStore) -> None:
    """Leave a store as a killed process does."""
    store._at_exit.cancel()
    store.index.close()
    store.data.close()
    os.close(store.folder._file)


def check_store(store: PrefixStore, limits: FileLimits, orphans: Collection[bytes] = ()) -> None:
    """Check the invariants of a store.

    Args:
        store: to be checked.
        limits: of its files.
        orphans: keys of blocks whose parent was removed.
    """
    with store.index._file.reading() as seen:
        records = dict(seen.txn.cursor(db=seen.dbs.blocks))
        blocks = {key: StoredBlock.unpack(key, record) for key, record in records.items()}
        order = list(seen.txn.cursor(db=seen.dbs.order))
        reserved = [_extents_of(row) for _, row in seen.txn.cursor(db=seen.dbs.reserved)]
        free = [
            (int.from_bytes(first), int.from_bytes(pages))
            for first, pages in seen.txn.cursor(db=seen.dbs.free)
        ]
        state = seen.state
        parents = {key: seen.details(block).parent for key, block in blocks.items()}
        served = {key for key, block in blocks.items() if seen.is_served(block)}
        assert seen.used_pages() * PAGE_BYTES <= limits.index_bytes
    taken = [extent for block in blocks.values() for extent in block.extents]
    taken += [extent for extents in reserved for extent in extents]
    extents = sorted(taken + free)
    assert all(first + pages == after for (first, pages), (after, _) in pairwise(extents))
    assert (extents[0][0], sum(extents[-1])) == (0, state.end) if extents else state.end == 0
    assert state.free == sum(pages for _, pages in free)
    assert state.end <= state.limit == limits.data_pages
    assert not any(sum(before) == after for before, (after, _) in pairwise(free))
    assert sorted(key for _, key in order) == sorted(blocks)
    for key in served - set(orphans):
        if (block := blocks[key]).depth:
            assert key[:16] + parents[key] in served
            parent = blocks[key[:16] + parents[key]]
            assert (parent.priority, parent.touch) >= (block.priority, block.touch)
            assert parent.depth == block.depth - 1
    folder = store.config.folder
    assert (folder / INDEX).stat().st_size <= limits.index_bytes
    assert (folder / DATA).stat().st_size <= limits.data_pages * PAGE_BYTES
