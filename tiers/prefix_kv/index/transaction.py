"""What one write transaction changes in the index.

Invariants, after every one: a page belongs to at most one record or reservation; the parent of a
block that may be served is in the index, may be served, and has a priority that isn't lower. The
second doesn't hold for the blocks that follow one that was removed because it was damaged, or
because the limit was lowered: they are found again once that one is stored again, or evicted as
others are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import lmdb

from tiers.encryption import Cipher
from tiers.entry import Provenance
from tiers.prefix_kv import policy
from tiers.prefix_kv.data_file import PAGE_BYTES, overhead_bytes
from tiers.prefix_kv.index.extents import Extent, unpack_row
from tiers.prefix_kv.index.reservations import Reservations, end_of
from tiers.prefix_kv.index.snapshot import (
    COUNTER,
    PURGES,
    SCOPE,
    SKETCH,
    STATE,
    KnownPurges,
    PrefixDatabases,
    Snapshot,
)
from tiers.prefix_kv.record import BlockChain, BlockDetails, StoredBlock, pack_details
from tiers.purges.table import PurgeTable

_MAX_EVICTIONS = 4096
"""Of one transaction, so that it doesn't hold the writers' lock for long."""
_EVICTIONS_FOR_INDEX = 2
"""For each block stored while the index is full, which so becomes smaller."""
_MAX_SCOPES = 32
"""Scopes without blocks are forgotten if there are more."""


class NewBlock(NamedTuple):
    """A block that is to be stored."""

    chain: BlockChain
    at: int
    """Its position in the chain."""
    size: int
    requests: int
    """How often it was requested lately."""
    purge_epoch: int
    """The last purge that was known when it was requested."""


class Reservation(NamedTuple):
    """Pages for a block whose bytes are to be written."""

    block: NewBlock
    sequence: int
    extents: tuple[Extent, ...]


class Move(NamedTuple):
    """Pages for a stored block whose bytes are to be copied there."""

    block: StoredBlock
    sequence: int
    """Of the reservation."""
    extents: tuple[Extent, ...]


class WriterSettings(NamedTuple):
    """How a process writes."""

    owner: int
    """The number of the process, which its reservations bear."""
    ttl_s: float
    """Seconds until a new block expires."""
    index_pages: int
    """Pages of the index from which on storing a block evicts others."""


class IndexTransaction(Snapshot):
    """A write transaction; `finish` comes last.

    Args:
        txn: the transaction.
        dbs: the index's databases.
        purges: those that were known before.
        cipher: encrypts what names a block, if it is to be encrypted.
        now: Unix seconds.
        settings: of this process.
    """

    def __init__(
        self,
        txn: "lmdb.Transaction[bytes]",
        dbs: PrefixDatabases,
        purges: KnownPurges,
        cipher: Cipher | None,
        now: float,
        settings: WriterSettings,
    ) -> None:
        super().__init__(txn, dbs, purges, cipher, now)
        self._settings = settings
        self._overhead_bytes = overhead_bytes(cipher)
        self._was = replace(self.state)
        self._pages = Reservations(txn, dbs, self.state, settings.owner)
        self.evicted = 0

    def finish(self) -> None:
        """Keep what was counted."""
        self._pages.finish()
        if self.state != self._was:
            self.put_meta(STATE, self.state.pack())

    def put_meta(self, name: bytes, value: bytes) -> None:
        """Keep a value under a name."""
        self.txn.put(name, value, db=self.dbs.meta)

    def skip_sequences(self, count: int) -> None:
        """Leave out numbers of blocks."""
        self.state.sequence += count

    def reserve(self, new: NewBlock) -> Reservation | None:
        """Take pages for a block; `None` if it isn't to be stored. Evicts others for it."""
        key = new.chain.key(new.at)
        held = self.record(key)
        if (held is not None and self.is_served(held)) or self._is_purged(new):
            return None
        if held is not None:
            self.remove(held)
        pages = -(-(new.size + self._overhead_bytes) // PAGE_BYTES)
        if not self._make_room(pages, policy.priority(self.state.age, new.requests), new.chain):
            return None
        extents = self._pages.take(pages)
        return None if extents is None else Reservation(new, *extents)

    def publish(self, reservation: Reservation, tag: bytes) -> bool:
        """Make a block known whose bytes are written; returns whether it is."""
        new, sequence, extents = reservation
        if not self._pages.end(sequence):
            return False
        chain, name, key = new.chain, new.chain.names[new.at], new.chain.key(new.at)
        expires_at = self.now + self._settings.ttl_s
        wanted, touch = policy.priority(self.state.age, new.requests), self._next_touch()
        is_orphan = False
        if new.at:
            parent = self.record(chain.key(new.at - 1))
            is_orphan = parent is None or not self.is_served(parent)
            if parent is not None:
                wanted, touch = min(wanted, parent.priority), min(touch, parent.touch)
                expires_at = min(expires_at, parent.expires_at)
        if is_orphan or self._is_purged(new) or self.record(key):
            self._pages.free(extents)
            return False
        self._forget_damaged(key)
        details = BlockDetails(
            name.parent, chain.adapter, "" if new.at else chain.salt, name.tokens
        )
        self._put(
            StoredBlock(
                key, new.size, new.at, sequence, wanted, touch, expires_at, new.purge_epoch, tag,
                extents, _pack_labels(chain), chain.is_plain,
                pack_details(details, key, sequence, self.cipher),
            )
        )  # fmt: skip
        return True

    def cancel(self, sequence: int, extents: Sequence[Extent]) -> None:
        """Give pages back."""
        if self._pages.end(sequence):
            self._pages.free(extents)

    def touch(self, keys: Sequence[bytes], counts: Sequence[int]) -> None:
        """Raise the priorities of a chain's blocks that were requested."""
        touch = self._next_touch()
        held: list[StoredBlock] = []
        for key in keys:
            block = self.record(key)
            if block is None:
                break
            held.append(block)
        priorities = policy.raised(
            self.state.age, counts[: len(held)], [block.priority for block in held]
        )
        for block, new in zip(reversed(held), priorities, strict=True):
            self.txn.delete(_order_of(block), db=self.dbs.order)
            self._put(replace(block, priority=new, touch=touch))

    def remove_if(self, key: bytes, sequence: int, extents: Sequence[Extent]) -> bool:
        """Remove a block if it has that number and those pages; returns whether it has."""
        block = self._unchanged(key, sequence, extents)
        if block is not None:
            self.remove(block)
        return block is not None

    def remove(self, block: StoredBlock) -> None:
        """Remove a block."""
        self.txn.delete(block.key, db=self.dbs.blocks)
        self.txn.delete(_order_of(block), db=self.dbs.order)
        self._pages.free(block.extents)

    def sweep(self, keys: Sequence[bytes]) -> None:
        """Remove what may not be served among the records under some keys."""
        for key in keys:
            block = self.record(key)
            if block is None:
                self._forget_damaged(key)
            elif not self.is_served(block):
                self.remove(block)

    def begin_move(self, block: StoredBlock) -> Move | None:
        """Take free pages that come before a block's last ones; `None` if they are too few."""
        pages = sum(pages for _, pages in block.extents)
        taken = self._pages.take(pages) if self._pages.has_between(pages) else None
        if taken is None:
            return None
        if end_of(taken[1]) >= end_of(block.extents):
            self.cancel(*taken)
            return None
        return Move(block, *taken)

    def end_move(self, move: Move) -> None:
        """Have the record say where the bytes are now."""
        if not self._pages.end(move.sequence):
            return
        block = self._unchanged(move.block.key, move.block.sequence, move.block.extents)
        if block is None:
            self._pages.free(move.extents)
            return
        self._pages.free(block.extents)
        self._put(replace(block, extents=move.extents))

    def merge_purges(self, table: PurgeTable) -> None:
        """Apply purges."""
        merged = self.purges.merged(table)
        if merged is not self.purges:
            self.put_meta(PURGES, merged.pack())

    def purge(self, labels: Sequence[str]) -> None:
        """Purge labels, whatever the clock says."""
        purged = self.purges.with_purge(int(self.now * 1e6), *labels)
        self.put_meta(PURGES, purged.pack())

    def save(
        self,
        counters: Mapping[tuple[str, str], float],
        sketches: Mapping[bytes, Callable[[bytes | None], bytes]],
    ) -> None:
        """Add to counters, and change sketches."""
        for (model, name), added in counters.items():
            key = f"{model}\0{name}".encode()
            before = self.txn.get(key, db=self.dbs.counters)
            total = added + (0.0 if before is None else unpack_row(COUNTER, before)[0])
            self.txn.put(key, COUNTER.pack(total), db=self.dbs.counters)
        for scope, change in sketches.items():
            saved = self.txn.get(SKETCH + scope, db=self.dbs.meta)
            self.put_meta(SKETCH + scope, change(saved))

    def describe_scope(self, scope: bytes, description: bytes) -> None:
        """Keep a scope's description, and forget scopes that have no blocks any more."""
        self.put_meta(SCOPE + scope, description)
        known = self.meta_after(SCOPE)
        with self.txn.cursor(db=self.dbs.blocks) as blocks:
            for other in known if len(known) > _MAX_SCOPES else ():
                has_blocks = blocks.set_range(other) and blocks.key().startswith(other)
                if other != scope and not has_blocks:
                    self.txn.delete(SCOPE + other, db=self.dbs.meta)
                    self.txn.delete(SKETCH + other, db=self.dbs.meta)

    def free_reservations(self, is_alive: Callable[[int], bool]) -> None:
        """Free the pages that dead processes have reserved."""
        self._pages.end_others(lambda owner, _: not is_alive(owner))

    def fit(self, limit: int) -> None:
        """Change the limit of the data file; removes the blocks beyond it."""
        if limit == self.state.limit:
            return
        self._pages.limit(limit)
        if self._pages.file_pages <= limit:
            return
        with self.txn.cursor(db=self.dbs.blocks) as cursor:
            keys = list(cursor.iternext(values=False))
        for key in keys:
            block = self.record(key)
            if block is not None and end_of(block.extents) > limit:
                self.remove(block)
        self._pages.end_others(lambda _, extents: end_of(extents) > limit)
        if self._pages.file_pages > limit:
            # Damaged records had these pages.
            self._pages.rebuild()

    def rebuild_free(self) -> None:
        """Find the free pages anew."""
        self._pages.rebuild()

    def _make_room(self, pages: int, wanted: float, chain: BlockChain) -> bool:
        """Evict blocks until there are so many free pages, and room in the index."""
        if pages > self.state.limit:
            return False
        is_index_full = self.used_pages() > self._settings.index_pages
        evictions = _EVICTIONS_FOR_INDEX if is_index_full else 0
        while evictions > 0 or not self._pages.has(pages):
            if not self._evict_below(wanted, chain):
                return False
            evictions -= 1
        return True

    def _evict_below(self, wanted: float, chain: BlockChain) -> bool:
        """Evict the block of the lowest priority, unless that is above `wanted`, or in `chain`."""
        if self.evicted >= _MAX_EVICTIONS:
            return False
        with self.txn.cursor(db=self.dbs.order) as order:
            if not order.first():
                return False
            row, key = order.item()
            block = self.record(key)
            if block is None or _order_of(block) != row:
                # The record is damaged, or was, and is another now.
                order.delete()
                self._forget_damaged(key)
                return True
        if self.is_served(block):
            if block.priority > wanted or _is_of(key, chain):
                return False
            self.state.age = max(self.state.age, block.priority)
            self.evicted += 1
        self.remove(block)
        return True

    def _unchanged(
        self, key: bytes, sequence: int, extents: Sequence[Extent]
    ) -> StoredBlock | None:
        """Return the block under a key, if it still has that number and those pages."""
        block = self.record(key)
        if block is None or (block.sequence, block.extents) != (sequence, tuple(extents)):
            return None
        return block

    def _forget_damaged(self, key: bytes) -> None:
        """Delete the record under a key if it is damaged; which pages it has isn't known."""
        if self.record(key) is None and self.txn.delete(key, db=self.dbs.blocks):
            self.state.is_leaky = True

    def _is_purged(self, new: NewBlock) -> bool:
        return self.purges.purges("", new.purge_epoch, _pack_labels(new.chain))

    def _put(self, block: StoredBlock) -> None:
        self.txn.put(block.key, block.pack(), db=self.dbs.blocks)
        self.txn.put(_order_of(block), block.key, db=self.dbs.order)

    def _next_touch(self) -> int:
        self.state.touch += 1
        return self.state.touch


def _is_of(key: bytes, chain: BlockChain) -> bool:
    return key.startswith(chain.scope) and any(key.endswith(name.hash) for name in chain.names)


def _order_of(block: StoredBlock) -> bytes:
    return policy.order_key(block.priority, block.touch, block.depth, block.sequence)


def _pack_labels(chain: BlockChain) -> bytes:
    return Provenance.of(0, chain.labels).packed_labels
