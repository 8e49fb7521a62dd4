"""One write transaction on the disk tier's file: put, drop, expire, evict.

Invariants: each entry has a place, a rank in `order`, and one in `expiries` if it expires; all
change in the same transaction, so several processes may write one file. A row whose entry is gone
is harmless: it goes when its turn comes.

Eviction is GreedyDual (Young 1994; with sizes and frequencies, Cherkasova 1998): the priority of
an entry is its worth plus the floor, which is the priority of what was evicted last, so what isn't
read any more falls behind without being touched, and to evict is to take the first row of a scope:
the lowest of all scopes that hold their share (`tiers.key`) or more.
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
    NOBODY,
    Place,
    pack,
    pack_blob,
    pack_held,
    pack_order,
    pack_place,
    pack_rank,
    pack_sequence,
    scope_of,
    sequence_of,
    unpack,
    unpack_blob,
    unpack_held,
    unpack_order,
    unpack_place,
    unpack_rank,
    unpack_sequence,
)

_STATE_NAME = b"state"
_STATE = Struct("<Qd")
"""The last sequence number or tick, which count together, and the floor."""
ABOVE = b"\xff"
"""After a scope, it is above all ranks, which are of numbers that aren't negative."""
_MAX_PRIORITY = 1e300
_MIN_RISE = 1 / 8
"""In worths, or in the entries that were stored since: a smaller rise isn't worth writing."""


class Databases(NamedTuple):
    """LMDB's handles; the names are those in the file."""

    entries: lmdb._Database
    """Key → record, which holds a sequence number, the entry's own."""
    places: lmdb._Database
    """Sequence number → place: priority, tick, expiry, key."""
    order: lmdb._Database
    """Scope, and rank by priority and tick → sequence number. A scope's first is evicted next."""
    expiries: lmdb._Database
    """Rank by expiry and sequence number → nothing. The first expires next."""
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
    """Makes a blob of what is there. Called in the writer's thread, perhaps more than once."""


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
    """A write transaction at work. Its counters are written by `end`.

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
        self._state = self._sequence, self._floor = self._read_state()
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
            self._drop_rows(sequence_of(record), key)
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
        place = Place(priority, self._sequence, change.expires_at, key)
        self._put_rows(self._sequence, place)

    def index(self, key: bytes) -> None:
        """Give an entry whose record verifies its rows, the lowest priority among them."""
        record = self._txn.get(key, db=self._dbs.entries)
        if record is not None:
            _, expires_at, sequence, _ = unpack(key, record)
            place = Place(self._floor, sequence, expires_at, key)
            self._put_rows(sequence, place)
            self._count(key, len(record))
            self._sequence = max(self._sequence, sequence)

    def raise_priorities(self, keys: Iterable[str]) -> None:
        """Give entries that were read the priority that they would have if stored now."""
        min_ticks = self._txn.stat(self._dbs.entries)["entries"] * _MIN_RISE
        for text in keys:
            key = text.encode()
            record = self._txn.get(key, db=self._dbs.entries)
            if record is None:
                continue
            record_bytes, sequence = len(record), sequence_of(record)
            place = place_of(self._txn, self._dbs, sequence)
            if place is None or place.key != key:
                continue
            priority = max(self._priority(text, record_bytes), place.priority)
            rises = priority - place.priority > (priority - self._floor) * _MIN_RISE
            if not rises and self._sequence - place.tick <= min_ticks:
                continue
            self._sequence += 1
            name = pack_sequence(sequence)
            self._txn.delete(pack_order(place), db=self._dbs.order)
            place = place._replace(priority=priority, tick=self._sequence)
            self._txn.put(pack_order(place), name, db=self._dbs.order)
            self._txn.put(name, pack_place(place), db=self._dbs.places)

    def expire(self, now: float, limit: int) -> None:
        """Drop up to `limit` entries that have expired, the first to expire first."""
        with self._txn.cursor(db=self._dbs.expiries) as cursor:
            while self._expired < limit and cursor.first():
                expires_at, sequence = unpack_rank(cursor.key())
                if expires_at > now:
                    return
                cursor.delete()
                self._expired += self._drop(sequence)

    def evict(self, target_bytes: int, limit: int) -> None:
        """Drop up to `limit` entries, the lowest first, until `target_bytes` hold the rest."""
        lowest: list[tuple[bytes, bytes]] = []
        with self._txn.cursor(db=self._dbs.order) as cursor:
            while self._evicted < limit and used_bytes(self._txn, self._dbs) > target_bytes:
                if not lowest and not (lowest := self._over_their_shares(cursor)):
                    # Entries that are in no order can't be told apart.
                    self._drop_all()
                    return
                rank, scope = heapq.heappop(lowest)
                if not cursor.set_key(scope + rank):
                    # Damage: it went with another.
                    continue
                sequence = unpack_sequence(cursor.value())
                cursor.delete()
                if self._drop(sequence):
                    self._floor = max(self._floor, unpack_rank(rank)[0])
                    self._evicted += 1
                if self._is_over_its_share(scope) and cursor.set_range(scope):
                    next_scope, rank = unpack_order(cursor.key())
                    if next_scope == scope:
                        heapq.heappush(lowest, (rank, scope))

    def end(self) -> Outcome:
        """Write the counters, and return what was done; the caller commits."""
        for scope in self._counted:
            if held := self._bytes[scope]:
                self._txn.put(scope, pack_held(scope, held), db=self._dbs.scopes)
            else:
                self._txn.delete(scope, db=self._dbs.scopes)
        if (self._sequence, self._floor) != self._state:
            state = _STATE.pack(self._sequence, self._floor)
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
                sequence, floor = _STATE.unpack(unpack_blob(_STATE_NAME, data))
                return sequence, floor
        except (ValueError, error):
            pass
        with (
            self._txn.cursor(db=self._dbs.places) as places,
            self._txn.cursor(db=self._dbs.order) as order,
        ):
            # The ticks that were given since the last place are unknown, but they are fewer.
            sequence = unpack_sequence(places.key()) + (1 << 32) if places.last() else 0
            ranks = [unpack_rank(rank)[0] for _, rank in lowest_of_scopes(order)]
            return sequence, min(ranks, default=0.0)

    def _priority(self, key: str, record_bytes: int) -> float:
        worth = self._worth(key, record_bytes)
        # A worth that is no number counts for nothing.
        return min(self._floor + (worth if worth > 0 else 0.0), _MAX_PRIORITY)

    def _drop(self, sequence: int) -> bool:
        """Drop the entry with that number and its rows. Returns whether there was one."""
        place = place_of(self._txn, self._dbs, sequence)
        if place is None:
            return False
        self._drop_rows(sequence, place.key)
        record = self._txn.get(place.key, db=self._dbs.entries)
        if record is None or sequence_of(record) != sequence:
            return False
        self._count(place.key, -len(record))
        return self._txn.delete(place.key, db=self._dbs.entries)

    def _put_rows(self, sequence: int, place: Place) -> None:
        name = pack_sequence(sequence)
        self._txn.put(name, pack_place(place), db=self._dbs.places)
        self._txn.put(pack_order(place), name, db=self._dbs.order)
        if place.expires_at < inf:
            self._txn.put(pack_rank(place.expires_at, sequence), b"", db=self._dbs.expiries)

    def _drop_rows(self, sequence: int, key: bytes) -> None:
        place = place_of(self._txn, self._dbs, sequence)
        # The number may be damaged, and another entry's.
        if place is None or place.key != key:
            return
        self._txn.delete(pack_sequence(sequence), db=self._dbs.places)
        self._txn.delete(pack_order(place), db=self._dbs.order)
        if place.expires_at < inf:
            self._txn.delete(pack_rank(place.expires_at, sequence), db=self._dbs.expiries)

    def _drop_all(self) -> None:
        dbs = self._dbs
        self._evicted += self._txn.stat(dbs.entries)["entries"]
        for db in (dbs.entries, dbs.places, dbs.order, dbs.expiries, dbs.scopes):
            self._txn.drop(db, delete=False)
        self._counted.clear()

    def _count(self, key: bytes, change: int) -> None:
        """Note that the records of a key's scope take more or, if `change` is negative, less."""
        if (scope := scope_of(key)) != NOBODY:
            self._bytes[scope] = max(0, self._held(scope) + change)
            self._counted.add(scope)
            self._total += change

    def _held(self, scope: bytes) -> int:
        if (held := self._bytes.get(scope)) is None:
            row = self._txn.get(scope, db=self._dbs.scopes)
            held = self._bytes[scope] = unpack_held(scope, row)
        return held

    def _over_their_shares(self, order: lmdb.Cursor) -> list[tuple[bytes, bytes]]:
        """Return, as a heap, lowest rank and scope of each that holds its share or more."""
        ranks = dict(lowest_of_scopes(order))
        held = [self._held(scope) for scope in ranks if scope != NOBODY]
        self._scopes, self._total = len(held), sum(held)
        lowest = [(rank, scope) for scope, rank in ranks.items() if self._is_over_its_share(scope)]
        heapq.heapify(lowest)
        return lowest

    def _is_over_its_share(self, scope: bytes) -> bool:
        return scope == NOBODY or self._bytes[scope] * self._scopes >= self._total


def place_of(txn: "lmdb.Transaction[memoryview]", dbs: Databases, sequence: int) -> Place | None:
    """Return the place of the entry with that number, or `None`."""
    row = txn.get(pack_sequence(sequence), db=dbs.places)
    try:
        return None if row is None else unpack_place(row)
    except error:
        return None


def lowest_of_scopes(order: lmdb.Cursor) -> Iterator[tuple[bytes, bytes]]:
    """Yield each scope that has entries, with its lowest rank."""
    found = order.first()
    while found:
        scope, rank = unpack_order(order.key())
        yield scope, rank
        found = order.set_range(scope + ABOVE)


def used_bytes(txn: "lmdb.Transaction[Any]", dbs: Databases) -> int:
    """Return the bytes of the pages that hold something."""
    stats = [txn.stat(db) for db in dbs]
    pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
    return pages * stats[0]["psize"]
