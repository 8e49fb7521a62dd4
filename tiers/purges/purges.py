"""Purges: which entries may not be served, in all tiers and processes, without searching them.

A purge gives a label an epoch higher than all before it: the time in microseconds, or one more than
the last epoch if the clock lags. An entry carries its labels and a purge epoch, the last that was
known when its generation began; it is purged if one of its labels has a higher epoch. So a purge
takes the same time for one entry and for millions, answers under generation are purged too, and
clocks that jump do no harm: only the order counts (Lamport, «Time, Clocks, and the Ordering of
Events in a Distributed System», 1978).

The epochs are kept in the disk tier's file, which processes may share. Invariants: an epoch in that
file is higher than all that were there before; an entry is served only after a check against a
table that was in the file at most `FRESH_S` ago.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from math import inf
from random import randrange
from typing import Any

from tiers.backend import BlobStore
from tiers.entry import Entry, Provenance
from tiers.purges.table import (
    ALL,
    HEAD_BYTES,
    MAX_BYTES,
    PurgeTable,
    check_labels,
)

logger = logging.getLogger(__name__)

FRESH_S = 0.02

_NAME = "purges"
_SETTLE_S = FRESH_S + 0.005  # An event loop's timers may fire a little early.
_DEADLINE_S = 5.0
_BY_CHANCE_US = 2**16
_BEYOND_US = 10**6 * 86400 * 365
"""Further ahead of the clock than any lost epoch can have been."""


class PurgeError(Exception):
    """A purge holds in this process, but perhaps not in others, nor after a restart.

    The next successful write makes up for it. If the process ends before that, purged entries of
    the tier that could not store the purge may be served again. So callers should purge again.
    """


class Purges:
    """The purges that this process knows.

    Args:
        disk: the chain's disk tier, which keeps the table for other processes and restarts.
        max_bytes: of the table.
        clock: returns Unix seconds.
        monotonic: a monotonic clock in seconds, for the age of the table.
        deadline_s: seconds that a purge may wait for the disk.
    """

    def __init__(
        self,
        disk: BlobStore | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        deadline_s: float = _DEADLINE_S,
    ) -> None:
        self.table = PurgeTable(max_bytes=max_bytes)
        self.shared_unknown = False
        """Whether other machines may have purges that this process hasn't read yet."""
        self.withholds = False
        """Whether every entry counts as purged, since other machines may have purged it."""
        self._disk, self._max_bytes, self._deadline_s = disk, max_bytes, deadline_s
        self._clock, self._monotonic = clock, monotonic
        self._refresh_at = inf if disk is None else -inf
        self._head = b""
        self._unreadable = self._is_damaged = False
        # Labels get their epochs at the commit, so until then every entry with one is purged.
        self._under_way: list[frozenset[str]] = []
        self._tasks: set[asyncio.Task[bool]] = set()

    def current(self) -> PurgeTable:
        """Return the purges that are known now, those of other processes included."""
        if self._monotonic() >= self._refresh_at:
            self._refresh()
        return self.table

    def provenance(self, labels: Iterable[str] = ()) -> Provenance:
        """Return the provenance of an answer whose generation begins now.

        Raises:
            ValueError: a label is empty or has a line break.
        """
        if self._monotonic() >= self._refresh_at:
            self._refresh()
        return Provenance.of(self.table.latest, labels)

    def is_purged(self, key: str, entry: Entry | Provenance) -> bool:
        """Return whether an entry under `key`, or an answer being generated for it, is purged."""
        if self._monotonic() >= self._refresh_at:
            self._refresh()
        is_unknown = self._unreadable or self.withholds
        if entry.purge_epoch >= self.table.latest and not self._under_way and not is_unknown:
            # The common case.
            return False
        return is_unknown or self._covers(key, entry)

    def is_known_purged(self, key: str, provenance: Provenance) -> bool:
        """Return whether an answer isn't worth storing, since it is known to be purged.

        While the file can't be read, an answer that is purged may be stored: `is_purged` hides it.
        """
        if self._monotonic() >= self._refresh_at:
            self._refresh()
        return self._covers(key, provenance)

    def is_encoded_known_purged(self, key: str, value: bytes) -> bool:
        """Return the same for an encoded entry; `False` if it can't be decoded."""
        try:
            return self.is_known_purged(key, Entry.provenance_of(value))
        except ValueError:
            return False

    async def purge(self, *labels: str) -> None:
        """Purge all entries with one of `labels`: `all`, `key:KEY`, or any `KIND:NAME`.

        Returns when the purge is on disk and all processes that use the file know it. Atomic: none
        of the labels is purged without the others.

        Raises:
            ValueError: one isn't a label, or there are more than `MAX_LABELS`.
            PurgeError: it could not be written in time; the next successful write includes it.
        """
        check_labels(labels)
        if self._disk is None:
            self.table = self.table.with_purge(self._clock_us(), *labels)
            return
        purged = frozenset(labels)
        self._under_way.append(purged)
        try:
            if not await self._in_time(self._commit(self._disk, labels)):
                self.table = self.table.with_purge(self._clock_us(), *labels)
                raise PurgeError(
                    "the disk tier could not store the purge in time; it holds in this process"
                )
        finally:
            self._under_way.remove(purged)
        await asyncio.sleep(_SETTLE_S)

    def with_purge(self, labels: Sequence[str]) -> PurgeTable:
        """Return the table with a purge that doesn't hold here until it is merged (`merge`)."""
        return self.table.with_purge(self._clock_us(), *labels)

    def read(self, packed: bytes) -> PurgeTable:
        """Return the table packed in `packed`; one that purges everything if it is damaged."""
        try:
            return PurgeTable.unpack(packed, max_bytes=self._max_bytes)
        except ValueError:
            return self.table.with_purge(self._clock_us() + _BEYOND_US, ALL)

    async def merge(
        self, table: PurgeTable, known: PurgeTable, *, awaits_opening: bool = True
    ) -> None:
        """Apply the purges of another machine at once, and write them to disk.

        Either may have purged while it couldn't know of the other's purges, whatever their clocks
        said: the table that holds here then has these purges under later epochs.

        Args:
            table: of the other machine.
            known: the last table that both had.
            awaits_opening: whether to wait until they are written although the disk tier isn't
                open yet; else they are written in the background.

        Raises:
            PurgeError: they could not be written in time; the next successful write includes them.
        """
        # Another process may have purged without the server a moment ago.
        self._refresh()
        merged, disk = self.table.reconciled(table, known), self._disk
        if merged is self.table:
            return
        self.table = merged
        if disk is None:
            return
        if not awaits_opening and not disk.is_open:
            # A commit that waits already will write the table as it is then.
            if not self._tasks:
                self._start(self._commit(disk))
        elif not await self._in_time(self._commit(disk)):
            raise PurgeError("the disk tier could not store purges in time")

    async def close(self) -> None:
        """Wait for writes under way; the disk tier must still be open."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._deadline_s)

    def _covers(self, key: str, entry: Entry | Provenance) -> bool:
        if self._under_way:
            own = {ALL, f"key:{key}", *entry.labels}
            if not all(map(own.isdisjoint, self._under_way)):
                return True
        return self.table.purges(key, entry.purge_epoch, entry.packed_labels)

    def _refresh(self) -> None:
        """Merge the table in the file, if it has changed."""
        disk = self._disk
        if disk is None or not disk.is_open:
            # Without a new `_refresh_at`, since entries may be read as soon as it is open.
            return
        now = self._monotonic()
        try:
            blob = disk.reload(_NAME, self._head)
            if blob is not None:
                self._adopt(blob)
        except OSError:
            # Rather a miss than an entry that another process has purged.
            self._unreadable = True
            return
        except ValueError as exc:
            self._purge_all_for_damage(disk, exc)
        self._unreadable = False
        self._refresh_at = now + FRESH_S

    def _adopt(self, blob: bytes) -> None:
        self.table = self._joined(PurgeTable.unpack(blob, max_bytes=self._max_bytes))
        self._head = blob[:HEAD_BYTES]
        self._is_damaged = False

    def _joined(self, held: PurgeTable) -> PurgeTable:
        """Return the table with the one that the file has."""
        if self._head:
            return self.table.merged(held)
        # What was purged or learned before the file was open may have lower epochs than its
        # entries.
        return self.table.reconciled(held, held)

    def _purge_all_for_damage(self, disk: BlobStore, exc: ValueError) -> None:
        if self._is_damaged:
            return
        self._is_damaged = True
        logger.error("everything is purged, since the table of purges can't be read: %s", exc)
        self.table = self.table.with_purge(self._clock_us() + _BEYOND_US, ALL)
        self._start(self._commit(disk))

    async def _commit(self, disk: BlobStore, labels: Sequence[str] = ()) -> bool:
        """Merge the table into the file's, and purge `labels`. Returns whether it is on disk."""
        packed = b""

        def change(blob: bytes | None) -> bytes:
            # Runs in the writer's thread, and once more if there was no room.
            nonlocal packed
            merged = self.table
            if blob is not None:
                merged = self._joined(self.read(blob))
            if labels:
                merged = merged.with_purge(self._clock_us(), *labels)
            packed = merged.pack()
            return packed

        is_written = await disk.update(_NAME, change)
        if is_written:
            self._head = packed[:HEAD_BYTES]
            self._adopt(packed)
        return is_written

    async def _in_time(self, commit: Coroutine[Any, Any, bool]) -> bool:
        """Return whether it succeeds before the deadline; it goes on in the background."""
        task = self._start(commit)
        await asyncio.wait([task], timeout=self._deadline_s)
        return task.done() and task.result()

    def _start(self, commit: Coroutine[Any, Any, bool]) -> asyncio.Task[bool]:
        task = asyncio.create_task(commit)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _clock_us(self) -> int:
        """Return the time in microseconds, and some by chance.

        So two machines that purge at once, without knowing of each other, take different epochs.
        """
        now_us = int(self._clock() * 1e6)
        return max(now_us, self.table.latest) + randrange(_BY_CHANCE_US)  # noqa: S311
