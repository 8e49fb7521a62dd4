"""The disk tier's backend: an LMDB file that survives restarts, bounded in bytes on disk.

One thread writes, many entries a transaction (group commit); the event loop reads inline, since a
warm read takes a microsecond. Entries that are not yet committed are read from `_pending`, so a
read always sees the last write. Invariants: the file never grows beyond `max_bytes` (the map is
that large); each record carries a format version and a checksum, and one that doesn't verify is a
miss; a row of `order` exists for each entry, oldest first, and decides what is evicted.

LMDB is described at http://www.lmdb.tech/doc/ and py-lmdb at https://lmdb.readthedocs.io.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from struct import Struct
from zlib import crc32

import lmdb

from tiers.backend import ByteCache

logger = logging.getLogger(__name__)

MIN_BYTES = 1024 * 1024

_FORMAT = 1
_HEADER = Struct("<BIdQ")
"""Format version, CRC-32 of the key and all that follows, expiry (Unix s), sequence number."""
_CHECKED_FROM = Struct("<BI").size
_SEQUENCE = Struct(">Q")
_BATCH_OPERATIONS = 256
_PENDING_BYTES = 64 * 1024 * 1024
_RESERVE_BYTES = 64 * 1024 * 1024
_EVICTION_ROUNDS = 8


@dataclass(slots=True, eq=False)
class _Write:
    """A write on its way to disk; `value` is `None` for a removal."""

    key: str
    value: bytes | None
    expires_at: float
    done: "asyncio.Future[bool]"


class DiskCache(ByteCache):
    """A cache in the LMDB file below the folder `path`, which never exceeds `max_bytes`.

    `set` returns once the entry is committed and synced. The oldest entries leave first. A file
    that LMDB can't open is set aside under another name, and the cache starts empty.

    Args:
        path: made, private to this user, if it isn't there.
        max_bytes: at least `MIN_BYTES`.

    Raises:
        OSError: the folder can't be made or written.
        ValueError: `max_bytes` is too small.
    """

    NAME = "disk"

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        namespace: str | None = None,
    ) -> None:
        super().__init__(clock=clock, namespace=namespace)
        if max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes must be at least {MIN_BYTES}, not {max_bytes}")
        self.path = path
        self.max_bytes = max_bytes
        # Room for pages that a transaction copies and for gaps between pages.
        self._reserve_bytes = min(max_bytes // 4, _RESERVE_BYTES)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._env = self._open()
        self._pending: dict[str, _Write] = {}
        self._pending_bytes = 0
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._closed = False
        self._writer = threading.Thread(target=self._run, name="disk-writer", daemon=True)
        self._writer.start()

    def read(self, key: str) -> bytes | None:
        if (write := self._pending.get(key)) is not None:
            return self._unless_expired(write.value, write.expires_at)
        raw_key = key.encode()
        try:
            # As a buffer, the value is copied only once.
            with self._env.begin(db=self._entries, buffers=True) as txn:
                record = txn.get(raw_key)
                if record is None:
                    return None
                value, expires_at, _ = _unpack(raw_key, record)
        except ValueError:
            self.usage.damaged += 1
            logger.warning("a record of the disk tier did not verify and is a miss")
            return None
        return self._unless_expired(value, expires_at)

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        too_large = len(value) > self._reserve_bytes // 4
        if too_large or self._pending_bytes + len(value) > _PENDING_BYTES:
            self.usage.refused += 1
            # Better no entry than the one that this value was to replace.
            await self.remove(key)
            return False
        return await self._submit(key, value, inf if expires_at is None else expires_at)

    async def touch(self, key: str, expires_at: float | None) -> bool:
        value = self.read(key)
        return value is not None and await self.write(key, value, expires_at)

    async def remove(self, key: str) -> bool:
        return self.read(key) is not None and await self._submit(key, None, inf)

    def keys(self) -> Iterable[str]:
        with self._env.begin(db=self._entries) as txn:
            found = {bytes(key).decode() for key in txn.cursor().iternext(values=False)}
        return found | set(self._pending)

    async def _close(self, *args: object, **kwargs: object) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        # Let the last writes settle before the file goes.
        await asyncio.sleep(0)
        self._env.close()

    def _unless_expired(self, value: bytes | None, expires_at: float) -> bytes | None:
        if value is not None and expires_at <= self.clock():
            self.usage.expirations += 1
            return None
        return value

    async def _submit(self, key: str, value: bytes | None, expires_at: float) -> bool:
        if self._closed:
            return False
        write = _Write(key, value, expires_at, asyncio.get_running_loop().create_future())
        self._pending[key] = write
        self._pending_bytes += len(value or b"")
        self._queue.put(write)
        # Shielded: the thread settles the future even if this caller goes away.
        return await asyncio.shield(write.done)

    def _settle(self, batch: Sequence[_Write], stored: bool) -> None:
        for write in batch:
            self._pending_bytes -= len(write.value or b"")
            if self._pending.get(write.key) is write:
                del self._pending[write.key]
            if not write.done.done():
                write.done.set_result(stored)

    # What follows runs in the writer's thread, but for `_open`.

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, ended = self._gather(first)
            stored = self._store(batch)
            # The loop may have been closed under us at exit.
            with contextlib.suppress(RuntimeError):
                first.done.get_loop().call_soon_threadsafe(self._settle, batch, stored)
            if ended:
                return

    def _gather(self, first: _Write) -> tuple[list[_Write], bool]:
        """Return what waits for this commit, and whether the end was among it."""
        batch, batch_bytes = [first], len(first.value or b"")
        while len(batch) < _BATCH_OPERATIONS and batch_bytes < self._reserve_bytes // 4:
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                break
            if write is None:
                return batch, True
            batch.append(write)
            batch_bytes += len(write.value or b"")
        return batch, False

    def _store(self, batch: Sequence[_Write]) -> bool:
        try:
            for attempt in range(_EVICTION_ROUNDS):
                self._evict(self.max_bytes - self._reserve_bytes * (1 + attempt // 2))
                try:
                    self._commit(batch)
                except lmdb.MapFullError:
                    continue
                return True
            logger.warning("the disk tier is full and could not make room")
        except lmdb.Error:
            logger.exception("the disk tier could not write")
        self.usage.refused += len(batch)
        return False

    def _commit(self, batch: Sequence[_Write]) -> None:
        with self._env.begin(write=True) as txn:
            sequence = self._next_sequence(txn)
            for write in batch:
                raw_key = write.key.encode()
                self._forget(txn, raw_key)
                if write.value is not None:
                    number = next(sequence)
                    record = _pack(raw_key, write.value, write.expires_at, number)
                    txn.put(raw_key, record, db=self._entries)
                    txn.put(_SEQUENCE.pack(number), raw_key, db=self._order, append=True)
        self._measure()

    def _next_sequence(self, txn: lmdb.Transaction) -> "itertools.count[int]":
        with txn.cursor(db=self._order) as cursor:
            last = _SEQUENCE.unpack(cursor.key())[0] if cursor.last() else 0
        return itertools.count(last + 1)

    def _forget(self, txn: lmdb.Transaction, raw_key: bytes) -> None:
        record = txn.pop(raw_key, db=self._entries)
        if record is not None and len(record) >= _HEADER.size:
            number = _HEADER.unpack_from(record)[3]
            txn.delete(_SEQUENCE.pack(number), raw_key, db=self._order)

    def _evict(self, target_bytes: int) -> None:
        """Drop the oldest entries until those that are left take at most `target_bytes`."""
        while self._measure() > max(target_bytes, 0) and self.usage.entries:
            with self._env.begin(write=True) as txn, txn.cursor(db=self._order) as cursor:
                for _ in range(min(_BATCH_OPERATIONS, 1 + self.usage.entries // 8)):
                    if not cursor.first():
                        break
                    txn.delete(bytes(cursor.value()), db=self._entries)
                    cursor.delete()
                    self.usage.evictions += 1

    def _measure(self) -> int:
        """Note and return the bytes of the pages in use."""
        with self._env.begin() as txn:
            stats = [txn.stat(db) for db in (self._entries, self._order)]
        pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        self.usage.entries = stats[0]["entries"]
        self.usage.bytes = pages * stats[0]["psize"]
        return self.usage.bytes

    def _open(self) -> lmdb.Environment:
        try:
            return self._open_file()
        except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError) as exc:
            aside = self.path / f"data.mdb.damaged-{int(self.clock())}"
            (self.path / "data.mdb").rename(aside)
            logger.warning("the disk tier's file can't be read (%s); set aside as %s", exc, aside)
            return self._open_file()
        except lmdb.Error as exc:
            raise OSError(f"can't open the disk tier in {self.path}: {exc}") from exc

    def _open_file(self) -> lmdb.Environment:
        env = lmdb.open(
            str(self.path), map_size=self.max_bytes, max_dbs=4, mode=0o600, max_readers=512
        )
        self._entries = env.open_db(b"entries")
        self._order = env.open_db(b"order")
        self._env = env
        self._measure()
        return env


def _pack(key: bytes, value: bytes, expires_at: float, sequence: int) -> bytes:
    head = _HEADER.pack(_FORMAT, 0, expires_at, sequence)
    checksum = crc32(value, crc32(head[_CHECKED_FROM:], crc32(key)))
    return _HEADER.pack(_FORMAT, checksum, expires_at, sequence) + value


def _unpack(key: bytes, record: bytes | memoryview) -> tuple[bytes, float, int]:
    """Return value, expiry and sequence number.

    Raises:
        ValueError: another format version, or the checksum is wrong.
    """
    if len(record) < _HEADER.size:
        raise ValueError("record is cut short")
    version, checksum, expires_at, sequence = _HEADER.unpack_from(record)
    if version != _FORMAT or checksum != crc32(record[_CHECKED_FROM:], crc32(key)):
        raise ValueError("record does not verify")
    return bytes(record[_HEADER.size :]), expires_at, sequence
