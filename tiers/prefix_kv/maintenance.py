"""Maintenance of a store by hand: verify all blocks, and make the data file smaller.

Both work beside engines that use the store.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from tiers.encryption import TAG_BYTES
from tiers.prefix_kv.data_file import DamagedBlockError
from tiers.prefix_kv.index.reservations import end_of
from tiers.prefix_kv.record import StoredBlock
from tiers.prefix_kv.store import Location, PrefixStore

_MOVED_AT_ONCE = 16
_SWEPT_AT_ONCE = 1000


class BlockReport(NamedTuple):
    """What was found in a store."""

    blocks: int
    damaged: int
    """Of them, blocks whose bytes don't verify."""


def verify(store: PrefixStore, *, repair: bool = False) -> BlockReport:
    """Read all blocks; with `repair`, remove those that are damaged.

    Raises:
        lmdb.Error: the index can't be read.
        OSError: the disk fails.
    """
    blocks = damaged = 0
    for block in store.index.blocks():
        blocks += 1
        location = Location.of(block)
        content, scratch = bytearray(block.size), bytearray(block.size + TAG_BYTES)
        try:
            store.read(location, memoryview(content), memoryview(scratch))
        except DamagedBlockError:
            # It may have been evicted or moved meanwhile.
            held = store.index.get(block.key)
            if held is not None and Location.of(held) == location:
                damaged += 1
                if repair:
                    store.discard(location)
    return BlockReport(blocks, damaged)


def compact(store: PrefixStore) -> int:
    """Make the data file smaller; returns the bytes saved.

    Removes what is purged or expired, moves blocks to free pages, and cuts off the file's end.

    An engine that reads a block while it is moved finds it damaged, and computes it.

    Raises:
        lmdb.Error: the index can't be read or written.
        OSError: the disk is full, or fails.
    """
    before = store.data.size()
    swept = b""
    while swept := store.index.sweep(swept, _SWEPT_AT_ONCE):
        pass
    last_first = iter(sorted(store.index.blocks(), key=_end_of, reverse=True))
    while blocks := list(islice(last_first, _MOVED_AT_ONCE)):
        # The pages that a move frees are for the next ones, so those that find none wait for them.
        while blocks and _move(store, blocks):
            blocks = [held for block in blocks if (held := _unmoved(store, block)) is not None]
        if blocks:
            break
    store.index.shorten(store.data.truncate)
    return before - store.data.size()


def _move(store: PrefixStore, blocks: Sequence[StoredBlock]) -> int:
    """Move as many blocks as there are free pages for; returns how many these are."""
    moves = store.index.begin_moves(blocks)
    try:
        for move in moves:
            sealed = bytearray(move.block.size + store.index.overhead_bytes)
            store.data.copy(move.block.extents, move.extents, memoryview(sealed))
    except BaseException:
        store.index.cancel(moves)
        raise
    store.index.end_moves(moves)
    return len(moves)


def _unmoved(store: PrefixStore, block: StoredBlock) -> StoredBlock | None:
    """Return a block that is still where it was."""
    held = store.index.get(block.key)
    return held if held is not None and held.extents == block.extents else None


def _end_of(block: StoredBlock) -> int:
    return end_of(block.extents)
