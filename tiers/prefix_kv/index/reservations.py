"""Pages of the data file within one write transaction: free ones, reserved ones, those of blocks.

A reservation keeps pages for a process that writes there, until the block is published or given up.
It has a number, which then is the block's, and which no other ever had.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from struct import Struct

import lmdb

from tiers.prefix_kv.index.extents import Extent, FreePages, gaps, pack_extent, unpack_row
from tiers.prefix_kv.index.snapshot import IndexState, PrefixDatabases
from tiers.prefix_kv.record import StoredBlock

_SEQUENCE = Struct(">Q")
_OWNER = Struct("<Q")
_EXTENT = Struct("<II")


class Reservations:
    """The pages, as a transaction changes them.

    Args:
        txn: a write transaction.
        dbs: the index's databases.
        state: counts numbers and pages; `finish` brings it up to date.
        owner: the number of the process, which its reservations bear.
    """

    def __init__(
        self, txn: "lmdb.Transaction[bytes]", dbs: PrefixDatabases, state: IndexState, owner: int
    ) -> None:
        self._txn, self._dbs, self._state, self._owner = txn, dbs, state, owner
        self._free = FreePages(txn, dbs.free, state.end, state.limit, state.free)

    def finish(self) -> None:
        """Count the free pages in the state."""
        self._state.end, self._state.free = self._free.end, self._free.pages

    @property
    def file_pages(self) -> int:
        """The pages that the file has, up to the last one that is taken."""
        return self._free.end

    def has(self, pages: int) -> bool:
        """Return whether so many pages can be taken."""
        return self._free.has(pages)

    def has_between(self, pages: int) -> bool:
        """Return whether so many pages can be taken without making the file longer."""
        return self._free.pages >= pages

    def take(self, pages: int) -> tuple[int, tuple[Extent, ...]] | None:
        """Reserve pages; returns the reservation's number, and where they are."""
        extents = self._free.take(pages)
        if extents is None:
            return None
        self._state.sequence += 1
        row = _OWNER.pack(self._owner) + b"".join(_EXTENT.pack(*extent) for extent in extents)
        self._txn.put(_SEQUENCE.pack(self._state.sequence), row, db=self._dbs.reserved)
        return self._state.sequence, tuple(extents)

    def end(self, sequence: int) -> bool:
        """End a reservation; its pages are the caller's, to use or to free.

        Returns whether there was one: others end those of who they take for dead.
        """
        return self._txn.delete(_SEQUENCE.pack(sequence), db=self._dbs.reserved)

    def free(self, extents: Sequence[Extent]) -> None:
        """Make pages free."""
        for extent in extents:
            self._free.free(extent)

    def end_others(self, is_over: Callable[[int, Sequence[Extent]], bool]) -> None:
        """Free the pages of the reservations that are over, by their owners and pages."""
        with self._txn.cursor(db=self._dbs.reserved) as cursor:
            rows = list(cursor)
        for sequence, row in rows:
            (owner,), extents = unpack_row(_OWNER, row[: _OWNER.size]), _extents_of(row)
            if is_over(owner, extents):
                self._txn.delete(sequence, db=self._dbs.reserved)
                self.free(extents)

    def limit(self, pages: int) -> None:
        """Change how many pages there may be."""
        self._state.limit = self._free.limit = pages

    def rebuild(self) -> None:
        """Find the free pages anew: those that no record that is whole and no reservation has."""
        taken: list[Extent] = []
        with self._txn.cursor(db=self._dbs.blocks) as cursor:
            for key, record in cursor:
                with suppress(ValueError):
                    taken += StoredBlock.unpack(key, record).extents
        with self._txn.cursor(db=self._dbs.reserved) as cursor:
            for _, row in cursor:
                taken += _extents_of(row)
        free, end = gaps(taken)
        self._txn.drop(self._dbs.free, delete=False)
        for extent in free:
            self._txn.put(*pack_extent(extent), db=self._dbs.free)
        pages = sum(pages for _, pages in free)
        self._free = FreePages(self._txn, self._dbs.free, end, self._state.limit, pages)
        self._state.is_leaky = False


def end_of(extents: Sequence[Extent]) -> int:
    """Return the page after the last one."""
    return max(first + pages for first, pages in extents)


def _extents_of(row: bytes) -> list[Extent]:
    starts = range(_OWNER.size, len(row), _EXTENT.size)
    return [unpack_row(_EXTENT, row[at : at + _EXTENT.size])[:2] for at in starts]
