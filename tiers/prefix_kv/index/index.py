"""The index of prefix blocks: an LMDB file beside the one with the blocks' bytes.

It holds records, the order of eviction, free pages, purges, counts of requests and counters, for
all engines that share the folder. Each method is one transaction, or a few, so the file is whole
however a process ends. A write waits for other processes, so only background threads write. A
killed process leaves reservations behind, which the next one that opens the index frees.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tiers.prefix_kv import policy
from tiers.prefix_kv.data_file import PAGE_BYTES, overhead_bytes
from tiers.prefix_kv.folder import Folder
from tiers.prefix_kv.index.extents import Extent
from tiers.prefix_kv.index.index_file import FileLimits, IndexFile
from tiers.prefix_kv.index.snapshot import SCOPE, SKETCH
from tiers.prefix_kv.index.transaction import Move, NewBlock, Reservation
from tiers.prefix_kv.record import SCOPE_BYTES, BlockChain, BlockDetails, StoredBlock
from tiers.purges.table import PurgeTable

_AT_ONCE = 256
"""To read so many records takes a millisecond."""
_PAGES_PER_TOUCH = 9
"""Of the index: LMDB copies at most one page of records and two of the order to touch a block, and
can't use the pages that they were in for two transactions more."""


class IndexStatistics(NamedTuple):
    """An index in numbers."""

    blocks: int
    block_bytes: int
    """Of the pages that blocks take."""
    index_bytes: int
    """Of the index's file."""
    free_bytes: int
    """Of pages of the data file that no block takes."""


class PrefixIndex:
    """An open index.

    Args:
        folder: holds the files; is locked by the caller while this opens them.
        limits: of the sizes of the index and the data file.
        key: encrypts what names a block; `None` for none.
        ttl_s: seconds until a block expires.
        clock: returns Unix seconds.
        syncs: whether a write waits until it is on disk.

    Raises:
        ForeignIndexError: the file isn't an index.
        OtherVersionError: it is another version's.
        EncryptionKeyError: it is encrypted otherwise.
        lmdb.Error: LMDB can't open it.
        OSError: the folder can't be used.
    """

    def __init__(
        self,
        folder: Folder,
        limits: FileLimits,
        *,
        key: bytes | None = None,
        ttl_s: float = 7 * 86400,
        clock: Callable[[], float] = time.time,
        syncs: bool = True,
    ) -> None:
        self._file = IndexFile(folder, limits, key, ttl_s, clock, syncs=syncs)
        self.cipher = self._file.cipher
        self.overhead_bytes = overhead_bytes(self.cipher)
        """Of each block's bytes in the data file."""

    def close(self) -> None:
        """Close the file; no other thread may use the index any more."""
        self._file.close()

    # All that follows raises `lmdb.Error` where the index can't be read or written; a write that
    # fails has changed nothing.

    def lookup(self, chain: BlockChain) -> list[StoredBlock]:
        """Return the blocks of a chain's longest beginning that is stored and may be served."""
        found: list[StoredBlock] = []
        with self._file.reading() as read:
            for at, name in enumerate(chain.names):
                if (block := read.served(chain.key(at))) is None:
                    break
                details = read.details(block)
                if details is None or (details.parent, details.tokens) != name[1:]:
                    break
                found.append(block)
        return found

    def purge_epoch(self) -> int:
        """Return the epoch of the last purge."""
        with self._file.reading() as read:
            return read.purges.latest

    def get(self, key: bytes) -> StoredBlock | None:
        """Return a record, expired or not; `None` if there is none, or a damaged one."""
        with self._file.reading() as read:
            return read.record(key)

    def holds(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those of the keys under which there is a block that may be served."""
        with self._file.reading() as read:
            return {key for key in keys if read.served(key) is not None}

    def hottest(self, scopes: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
        """Yield keys and depths of the scopes' blocks, the last to be evicted first."""
        row: bytes | None = None
        while True:
            with self._file.reading() as read:
                rows = read.ordered_below(row, _AT_ONCE)
            # Where keys aren't in order, there is no end.
            if not rows or (row is not None and rows[-1][0] >= row):
                return
            row = rows[-1][0]
            for order_key, key in rows:
                if key.startswith(tuple(scopes)) and policy.is_order_key(order_key):
                    yield key, policy.depth_of(order_key)

    def chain_to(self, key: bytes) -> list[tuple[StoredBlock, BlockDetails]] | None:
        """Return the chain that ends with the block under a key, if all of it may be served."""
        found: list[tuple[StoredBlock, BlockDetails]] = []
        scope = key[:SCOPE_BYTES]
        with self._file.reading() as read:
            while True:
                block = read.served(key)
                details = None if block is None else read.details(block)
                if block is None or details is None:
                    return None
                if found and block.depth >= found[-1][0].depth:
                    return None
                found.append((block, details))
                if not details.parent:
                    return found[::-1]
                key = scope + details.parent

    def described(self, keys: Sequence[bytes]) -> dict[bytes, tuple[StoredBlock, BlockDetails]]:
        """Return those of the blocks that may be served, with what they are of."""
        with self._file.reading() as read:
            found = [block for key in keys if (block := read.served(key)) is not None]
            return {
                block.key: (block, details)
                for block in found
                if (details := read.details(block)) is not None
            }

    def statistics(self) -> IndexStatistics:
        """Count blocks and bytes."""
        with self._file.reading() as read:
            state = read.state
            blocks = read.txn.stat(self._file.dbs.blocks)["entries"]
        taken = (state.end - state.free) * PAGE_BYTES
        return IndexStatistics(blocks, taken, self._file.size(), state.free * PAGE_BYTES)

    def blocks(self) -> Iterator[StoredBlock]:
        """Yield all blocks, but those that are stored meanwhile, and damaged records."""
        after = b""
        while True:
            with self._file.reading() as read:
                keys = read.keys_after(after, _AT_ONCE)
                found = [read.record(key) for key in keys]
            if not keys or keys[-1] <= after:
                return
            yield from (block for block in found if block is not None)
            after = keys[-1]

    def sketch(self, scope: bytes) -> bytes | None:
        """Return the counts of requests that were saved for a scope."""
        with self._file.reading() as read:
            return read.meta(SKETCH + scope)

    def scopes(self) -> dict[bytes, bytes]:
        """Return the scopes that engines have used, with their descriptions."""
        with self._file.reading() as read:
            return read.meta_after(SCOPE)

    def counters(self) -> dict[tuple[str, str], float]:
        """Return the counters of all engines since the index was made, by model and name."""
        with self._file.reading() as read:
            return dict(read.counters())

    def reserve(self, blocks: Sequence[NewBlock]) -> tuple[list[Reservation], int]:
        """Take pages for blocks that aren't stored yet; evicts blocks of lower priority.

        Blocks that are stored, purged, or worth less than all others get no pages. Returns the
        reservations, and how many blocks were evicted.
        """
        with self._file.writing() as write:
            reserved = [each for block in blocks if (each := write.reserve(block)) is not None]
            return reserved, write.evicted

    def publish(self, written: Sequence[tuple[Reservation, bytes]]) -> int:
        """Make blocks known whose bytes are written, with their tags. Returns how many were stored.

        Those whose parent isn't stored, or that were purged meanwhile, are dropped.
        """
        with self._file.writing() as write:
            return sum(write.publish(reservation, tag) for reservation, tag in written)

    def cancel(self, reservations: Sequence[Reservation | Move]) -> None:
        """Give pages back."""
        with self._file.writing() as write:
            for each in reservations:
                write.cancel(each.sequence, each.extents)

    def touch(self, chains: Sequence[tuple[Sequence[bytes], Sequence[int]]]) -> None:
        """Raise the priorities of blocks that were requested.

        Of a chain longer than what fits into one transaction, the rest keeps its priority.

        Args:
            chains: keys of stored blocks, a prompt's first block first, and how often each was
                requested lately.
        """
        most = self._file.reserve_pages // _PAGES_PER_TOUCH
        at_once, at = min(most, _AT_ONCE), 0
        while at < len(chains):
            touched = 0
            with self._file.writing() as write:
                while at < len(chains) and (not touched or touched + len(chains[at][0]) <= at_once):
                    keys, counts = chains[at]
                    write.touch(keys[:most], counts[:most])
                    touched += len(keys)
                    at += 1

    def remove(self, key: bytes, sequence: int, extents: Sequence[Extent]) -> bool:
        """Remove a block that is still stored there under that number. Returns whether it is."""
        with self._file.writing() as write:
            return write.remove_if(key, sequence, extents)

    def merge_purges(self, table: PurgeTable) -> None:
        """Apply purges: the blocks that they cover are not found any more."""
        with self._file.writing() as write:
            write.merge_purges(table)

    def purge(self, labels: Sequence[str]) -> None:
        """Purge the blocks that are stored now and have one of the labels."""
        with self._file.writing() as write:
            write.purge(labels)

    def save(
        self,
        counters: Mapping[tuple[str, str], float],
        sketches: Mapping[bytes, Callable[[bytes | None], bytes]],
    ) -> None:
        """Add to counters, and change saved counts of requests by functions, by scope."""
        with self._file.writing() as write:
            write.save(counters, sketches)

    def describe_scope(self, scope: bytes, description: bytes) -> None:
        """Keep a scope's description."""
        with self._file.writing() as write:
            write.describe_scope(scope, description)

    def sweep(self, after: bytes, most: int) -> bytes:
        """Remove what may not be served any more among the next `most` records after a key.

        Returns the last key looked at, or an empty one at the end.
        """
        with self._file.reading() as read:
            keys = read.keys_after(after, most)
            over = [key for key in keys if read.served(key) is None]
        if over:
            with self._file.writing() as write:
                write.sweep(over)
        if len(keys) == most and keys[-1] > after:
            return keys[-1]
        self._find_lost_pages()
        return b""

    def _find_lost_pages(self) -> None:
        """Free the pages of records that were damaged."""
        with self._file.reading() as read:
            is_leaky = read.state.is_leaky
        if is_leaky:
            with self._file.writing() as write:
                write.rebuild_free()

    def begin_moves(self, blocks: Sequence[StoredBlock]) -> list[Move]:
        """Take free pages nearer to the begin of the data file for as many blocks as there are."""
        with self._file.writing() as write:
            return [move for block in blocks if (move := write.begin_move(block)) is not None]

    def end_moves(self, moves: Sequence[Move]) -> None:
        """Note where blocks are whose bytes have been copied, and free the pages they had."""
        with self._file.writing() as write:
            for move in moves:
                write.end_move(move)

    def shorten(self, truncate: Callable[[int], None]) -> None:
        """Call a function with the number of pages that are in use, while nobody takes others."""
        with self._file.writing() as write:
            truncate(write.state.end)
