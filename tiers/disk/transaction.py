"""One write transaction on the disk tier's file: put, drop, expire, evict.

Invariants: each entry has a row in `rows`, one in `order`, and one in `expiries` if it expires; all
change in the same transaction, so several processes may write one file. A row whose entry is gone
is harmless: it is deleted when its turn comes.

Eviction is GreedyDual (Young 1994; with sizes and frequencies, Cherkasova 1998): the priority of
an entry is its worth plus the clock (the papers' L), which is the priority of what was evicted
last. So what isn't read any more falls behind without being touched, and to evict is to take the
first row in `order` of a scope: the lowest of all scopes that hold their share (`tiers.key`) or
more.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from struct import Struct, error
from typing import Any, NamedTuple, Self

import lmdb

from tiers.disk.codec import Codec
from tiers.disk.record_format import (
    NO_SCOPE,
    IndexRow,
    pack,
    pack_blob,
    pack_order,
    pack_row,
    pack_scope_bytes,
    pack_sequence,
    pack_sort_key,
    scope_of,
    sequence_of,
    unpack,
    unpack_blob,
    unpack_order,
    unpack_row,
    unpack_scope_bytes,
    unpack_sequence,
    unpack_sort_key,
)

_STATE_NAME = b"state"
_STATE = Struct("<Qd")
"""The last sequence number or touch, which count together, and the clock."""
ABOVE = b"\xff"
"""After a scope, it is above all sort keys, which are of numbers that aren't negative."""
_MAX_PRIORITY = 1e300
_MIN_RISE = 1 / 8
"""In worths, or in the entries that were stored since: a smaller rise isn't worth writing."""


class Databases(NamedTuple):
    """LMDB's handles."""

    entries: lmdb._Database
    """Key → record, which holds a sequence number, the entry's own."""
    rows: lmdb._Database
    """Sequence number → `IndexRow`."""
    order: lmdb._Database
    """Scope, priority and touch → sequence number. A scope's first is evicted next."""
    expiries: lmdb._Database
    """Expiry and sequence number → nothing. The first expires next."""
    scopes: lmdb._Database
    """Scope → bytes of its records."""
    meta: lmdb._Database
    """Name → blob."""


@dataclass(frozen=True, slots=True)
class Change:
    """An entry to put or, without a value, to drop; or a blob."""

    key: str
    value: bytes | None
    expires_at: float = inf
    is_blob: bool = False
    """`key` names a blob and not an entry."""
    update: Callable[[bytes | None], bytes] | None = None
    """Makes a blob of the one that is there. Called in the writer's thread, perhaps repeatedly."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction did besides its changes, and what the file holds after it."""

    evicted: int = 0
    expired: int = 0
    entries: int = 0
    used_bytes: int = 0

    def then(self, later: Self) -> Self:
        """Return the outcome of this transaction and a later one."""
        return replace(
            later, evicted=self.evicted + later.evicted, expired=self.expired + later.expired
        )


class Transaction:
    """A write transaction under way. Its counters are written by `end`.

    Args:
        txn: begun for writing, with buffers.
        dbs: the handles.
        codec: makes payloads.
        worth: what keeping an entry is worth, from its key and its bytes in the file.
    """

    def __init__(
        self,
        txn: "lmdb.Transaction[memoryview]",
        dbs: Databases,
        codec: Codec,
        worth: Callable[[str, int], float],
    ) -> None:
        self._txn = txn
        self._dbs = dbs
        self._codec = codec
        self._worth = worth
        self._state = self._sequence, self._clock = self._read_state()
        self._bytes: dict[bytes, int] = {}
        self._counted: set[bytes] = set()
        self._scopes = self._total = 0
        self._evicted = 0
        self._expired = 0

    def apply(self, change: Change) -> None:
        """Put or drop an entry or a blob."""
        key = change.key.encode()
        if change.is_blob:
            blob = self._updated(key, change.update) if change.update else change.value or b""
            data = pack_blob(key, self._codec.encode_blob(key, blob))
            self._txn.put(key, data, db=self._dbs.meta)
            return
        if (record := self._txn.get(key, db=self._dbs.entries)) is not None:
            self._delete_rows(sequence_of(record), key)
            self._count(key, -len(record))
        if change.value is None:
            self._txn.delete(key, db=self._dbs.entries)
            return
        self._sequence += 1
        coding, payload = self._codec.encode(key, change.value, self._sequence)
        record_bytes = pack(key, coding, change.expires_at, self._sequence, payload)
        priority = self._priority(change.key, len(record_bytes))
        self._txn.put(key, record_bytes, db=self._dbs.entries)
        self._count(key, len(record_bytes))
        row = IndexRow(priority, self._sequence, change.expires_at, key)
        self._put_rows(self._sequence, row)

    def index(self, key: bytes) -> None:
        """Write the rows of an entry whose record verifies, with the lowest priority."""
        record = self._txn.get(key, db=self._dbs.entries)
        if record is not None:
            _, expires_at, sequence, _ = unpack(key, record)
            row = IndexRow(self._clock, sequence, expires_at, key)
            self._put_rows(sequence, row)
            self._count(key, len(record))
            self._sequence = max(self._sequence, sequence)

    def raise_priorities(self, keys: Iterable[str]) -> None:
        """Give entries that were read the priority that they would have if stored now."""
        min_touches = self._txn.stat(self._dbs.entries)["entries"] * _MIN_RISE
        for text in keys:
            key = text.encode()
            record = self._txn.get(key, db=self._dbs.entries)
            if record is None:
                continue
            record_bytes, sequence = len(record), sequence_of(record)
            row = row_of(self._txn, self._dbs, sequence)
            if row is None or row.key != key:
                continue
            priority = max(self._priority(text, record_bytes), row.priority)
            rises = priority - row.priority > (priority - self._clock) * _MIN_RISE
            if not rises and self._sequence - row.touch <= min_touches:
                continue
            self._sequence += 1
            number = pack_sequence(sequence)
            self._txn.delete(pack_order(row), db=self._dbs.order)
            row = row._replace(priority=priority, touch=self._sequence)
            self._txn.put(pack_order(row), number, db=self._dbs.order)
            self._txn.put(number, pack_row(row), db=self._dbs.rows)

    def expire(self, now: float, limit: int) -> None:
        """Drop up to `limit` entries that have expired, the first to expire first."""
        with self._txn.cursor(db=self._dbs.expiries) as cursor:
            while self._expired < limit and cursor.first():
                expires_at, sequence = unpack_sort_key(cursor.key())
                if expires_at > now:
                    return
                cursor.delete()
                self._expired += self._drop(sequence)

    def evict(self, target_bytes: int, limit: int) -> None:
        """Drop up to `limit` entries, the lowest first, until `target_bytes` hold the rest."""
        lowest: list[tuple[bytes, bytes]] = []
        with self._txn.cursor(db=self._dbs.order) as cursor:
            while self._evicted < limit and used_bytes(self._txn, self._dbs) > target_bytes:
                if not lowest and not (lowest := self._scopes_over_share(cursor)):
                    # Nothing orders the entries that are left.
                    self._drop_all()
                    return
                sort_key, scope = heapq.heappop(lowest)
                if not cursor.set_key(scope + sort_key):
                    # Damage: it was deleted with another.
                    continue
                sequence = unpack_sequence(cursor.value())
                cursor.delete()
                if self._drop(sequence):
                    self._clock = max(self._clock, unpack_sort_key(sort_key)[0])
                    self._evicted += 1
                if self._is_over_share(scope) and cursor.set_range(scope):
                    next_scope, sort_key = unpack_order(cursor.key())
                    if next_scope == scope:
                        heapq.heappush(lowest, (sort_key, scope))

    def end(self) -> Outcome:
        """Write the counters, and return what was done; the caller commits."""
        for scope in self._counted:
            if held := self._bytes[scope]:
                self._txn.put(scope, pack_scope_bytes(scope, held), db=self._dbs.scopes)
            else:
                self._txn.delete(scope, db=self._dbs.scopes)
        if (self._sequence, self._clock) != self._state:
            state = _STATE.pack(self._sequence, self._clock)
            self._txn.put(_STATE_NAME, pack_blob(_STATE_NAME, state), db=self._dbs.meta)
        return Outcome(
            self._evicted,
            self._expired,
            self._txn.stat(self._dbs.entries)["entries"],
            used_bytes(self._txn, self._dbs),
        )

    def _updated(self, key: bytes, update: Callable[[bytes | None], bytes]) -> bytes:
        data = self._txn.get(key, db=self._dbs.meta)
        try:
            blob = None
            if data is not None:
                blob = self._codec.decode_blob(key, unpack_blob(key, data))
        except ValueError:
            blob = b""
        return update(blob)

    def _read_state(self) -> tuple[int, float]:
        data = self._txn.get(_STATE_NAME, db=self._dbs.meta)
        try:
            if data is not None:
                sequence, clock = _STATE.unpack(unpack_blob(_STATE_NAME, data))
                return sequence, clock
        except (ValueError, error):
            pass
        with (
            self._txn.cursor(db=self._dbs.rows) as rows,
            self._txn.cursor(db=self._dbs.order) as order,
        ):
            # The touches since the last row was stored are unknown, but fewer than this.
            sequence = unpack_sequence(rows.key()) + (1 << 32) if rows.last() else 0
            priorities = [unpack_sort_key(lowest)[0] for _, lowest in lowest_by_scope(order)]
            return sequence, min(priorities, default=0.0)

    def _priority(self, key: str, record_bytes: int) -> float:
        worth = self._worth(key, record_bytes)
        # A worth that isn't a number counts as 0.
        return min(self._clock + (worth if worth > 0 else 0.0), _MAX_PRIORITY)

    def _drop(self, sequence: int) -> bool:
        """Drop the entry with that number and its rows. Returns whether there was one."""
        row = row_of(self._txn, self._dbs, sequence)
        if row is None:
            return False
        self._delete_rows(sequence, row.key)
        record = self._txn.get(row.key, db=self._dbs.entries)
        if record is None or sequence_of(record) != sequence:
            return False
        self._count(row.key, -len(record))
        return self._txn.delete(row.key, db=self._dbs.entries)

    def _put_rows(self, sequence: int, row: IndexRow) -> None:
        number = pack_sequence(sequence)
        self._txn.put(number, pack_row(row), db=self._dbs.rows)
        self._txn.put(pack_order(row), number, db=self._dbs.order)
        if row.expires_at < inf:
            self._txn.put(pack_sort_key(row.expires_at, sequence), b"", db=self._dbs.expiries)

    def _delete_rows(self, sequence: int, key: bytes) -> None:
        row = row_of(self._txn, self._dbs, sequence)
        # The number may be damaged, and be that of another entry.
        if row is None or row.key != key:
            return
        self._txn.delete(pack_sequence(sequence), db=self._dbs.rows)
        self._txn.delete(pack_order(row), db=self._dbs.order)
        if row.expires_at < inf:
            self._txn.delete(pack_sort_key(row.expires_at, sequence), db=self._dbs.expiries)

    def _drop_all(self) -> None:
        dbs = self._dbs
        self._evicted += self._txn.stat(dbs.entries)["entries"]
        for db in (dbs.entries, dbs.rows, dbs.order, dbs.expiries, dbs.scopes):
            self._txn.drop(db, delete=False)
        self._counted.clear()

    def _count(self, key: bytes, change: int) -> None:
        """Add `change` to the bytes that the records of a key's scope take."""
        if (scope := scope_of(key)) != NO_SCOPE:
            self._bytes[scope] = max(0, self._scope_bytes(scope) + change)
            self._counted.add(scope)
            self._total += change

    def _scope_bytes(self, scope: bytes) -> int:
        if (held := self._bytes.get(scope)) is None:
            row = self._txn.get(scope, db=self._dbs.scopes)
            held = self._bytes[scope] = unpack_scope_bytes(scope, row)
        return held

    def _scopes_over_share(self, order: lmdb.Cursor) -> list[tuple[bytes, bytes]]:
        """Return, as a heap, lowest sort key and scope of each that holds its share or more."""
        lowest_of = dict(lowest_by_scope(order))
        held = [self._scope_bytes(scope) for scope in lowest_of if scope != NO_SCOPE]
        self._scopes, self._total = len(held), sum(held)
        lowest = [(key, scope) for scope, key in lowest_of.items() if self._is_over_share(scope)]
        heapq.heapify(lowest)
        return lowest

    def _is_over_share(self, scope: bytes) -> bool:
        return scope == NO_SCOPE or self._bytes[scope] * self._scopes >= self._total


def row_of(txn: "lmdb.Transaction[memoryview]", dbs: Databases, sequence: int) -> IndexRow | None:
    """Return the row of the entry with that sequence number, or `None`."""
    row = txn.get(pack_sequence(sequence), db=dbs.rows)
    try:
        return None if row is None else unpack_row(row)
    except error:
        return None


def lowest_by_scope(order: lmdb.Cursor) -> Iterator[tuple[bytes, bytes]]:
    """Yield each scope that has entries, with its lowest sort key."""
    found = order.first()
    while found:
        scope, sort_key = unpack_order(order.key())
        yield scope, sort_key
        found = order.set_range(scope + ABOVE)


def used_bytes(txn: "lmdb.Transaction[Any]", dbs: Databases) -> int:
    """Return the bytes of the pages that the databases use."""
    stats = [txn.stat(db) for db in dbs]
    pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
    return pages * stats[0]["psize"]
