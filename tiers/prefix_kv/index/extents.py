"""Which pages of the data file are free, as extents: runs of pages, `(first page, pages)`.

Blocks of any size take any free extents, so the file never fragments into unusable gaps: it is full
only when all pages are taken. Freed extents join their neighbours, so blocks of one size mostly get
one extent each.

Kept in a database of the index, by first page, so that all processes agree.
"""

from collections.abc import Sequence
from struct import Struct, error
from typing import Any

import lmdb

_NUMBER = Struct(">I")

Extent = tuple[int, int]
"""First page and number of pages."""


class FreePages:
    """The free pages, within one write transaction.

    Args:
        txn: a write transaction.
        db: holds the free extents.
        end: the page after the last one that the file has; pages from there on are free as well.
        limit: the page after the last one that the file may have.
        pages: the number of pages in free extents.

    The methods raise `lmdb.CorruptedError` where the database is damaged.
    """

    def __init__(
        self, txn: "lmdb.Transaction[bytes]", db: Any, end: int, limit: int, pages: int
    ) -> None:
        self._txn, self._db = txn, db
        self.end, self.limit, self.pages = end, limit, pages

    def has(self, pages: int) -> bool:
        """Return whether so many pages are free."""
        return pages <= self.pages + max(self.limit - self.end, 0)

    def take(self, pages: int) -> list[Extent] | None:
        """Take pages out of the free ones, the first that there are; `None` if they are too few."""
        if not self.has(pages):
            return None
        taken: list[Extent] = []
        missing = pages
        with self._txn.cursor(db=self._db) as cursor:
            while missing and cursor.first():
                first, free = _unpack(cursor.item())
                if not 0 < free <= self.end - first:
                    raise lmdb.CorruptedError("free pages are damaged")
                used = min(free, missing)
                cursor.delete()
                taken.append((first, used))
                missing -= used
                if used < free:
                    self._put(first + used, free - used)
        self.pages -= pages - missing
        if missing:
            if missing > self.limit - self.end:
                raise lmdb.CorruptedError("the number of free pages is damaged")
            taken.append((self.end, missing))
            self.end += missing
        return _joined(taken)

    def free(self, extent: Extent) -> None:
        """Make an extent free, joined with its neighbours."""
        first, pages = extent
        if first + pages > self.end:
            raise lmdb.CorruptedError("a block has pages that the file has not")
        self.pages += pages
        with self._txn.cursor(db=self._db) as cursor:
            has_next = cursor.set_range(_NUMBER.pack(first))
            if has_next:
                after, free = _unpack(cursor.item())
                if after < first + pages:
                    raise lmdb.CorruptedError("a page would be free twice")
                if after == first + pages:
                    pages += free
                    cursor.delete()
                    has_next = cursor.set_range(_NUMBER.pack(first))
            if cursor.prev() if has_next else cursor.last():
                before, free = _unpack(cursor.item())
                if before + free > first:
                    raise lmdb.CorruptedError("a page would be free twice")
                if before + free == first:
                    first, pages = before, free + pages
                    cursor.delete()
        if first + pages == self.end:
            self.end = first
            self.pages -= pages
        else:
            self._put(first, pages)

    def _put(self, first: int, pages: int) -> None:
        self._txn.put(_NUMBER.pack(first), _NUMBER.pack(pages), db=self._db)


def gaps(taken: Sequence[Extent]) -> tuple[list[Extent], int]:
    """Return the free extents between taken ones, and the page after the last of these."""
    free, end = [], 0
    for first, pages in sorted(taken):
        if first > end:
            free.append((end, first - end))
        end = max(end, first + pages)
    return free, end


def pack_extent(extent: Extent) -> tuple[bytes, bytes]:
    """Return the key and value of a free extent."""
    return _NUMBER.pack(extent[0]), _NUMBER.pack(extent[1])


def unpack_row(layout: Struct, row: bytes) -> tuple[Any, ...]:
    """Return what is in a row of the index.

    Raises:
        lmdb.CorruptedError: it has another length.
    """
    try:
        return layout.unpack(row)
    except error as exc:
        raise lmdb.CorruptedError(f"a row is damaged: {exc}") from exc


def _unpack(item: tuple[bytes, bytes]) -> Extent:
    return unpack_row(_NUMBER, item[0]) + unpack_row(_NUMBER, item[1])


def _joined(extents: Sequence[Extent]) -> list[Extent]:
    """Return the same pages in as few extents as possible, in the same order."""
    joined: list[Extent] = []
    for first, pages in extents:
        if joined and sum(joined[-1]) == first:
            joined[-1] = joined[-1][0], joined[-1][1] + pages
        else:
            joined.append((first, pages))
    return joined
