"""The disk tier's LMDB file: its databases, how they are opened and read, and their statistics.

What a write transaction does to them is `transaction`'s subject. Invariant: whoever uses the map
holds the lock, but for the one thread that writes, so the map can be replaced or closed safely.
LMDB is described at http://www.lmdb.tech/doc/ and py-lmdb at https://lmdb.readthedocs.io.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.disk.codec import SEALED, ZSTD_DICTIONARY, Codec
from tiers.disk.encryption import Cipher, EncryptionKeyError
from tiers.disk.record_format import (
    FORMAT,
    begins_with,
    pack_blob,
    unpack,
    unpack_blob,
    unpack_order,
    unpack_sequence,
)
from tiers.disk.transaction import (
    ABOVE,
    Change,
    Databases,
    Outcome,
    Transaction,
    lowest_of_scopes,
    place_of,
    used_bytes,
)

DATA = "data.mdb"
MAX_KEY_BYTES = 511
"""LMDB's limit."""

_META = b"meta"
_FORMAT_NAME = b"format"
_DICTIONARY_NAME = b"dictionary"
_SEAL_NAME = b"seal"
_MAX_RESERVE_BYTES = 64 * 1024 * 1024
_ROUNDS = 8
_READER_S = 0.005
_DROPS = 1024
_DROP_BYTES = 16 * 1024
"""What a transaction may have to copy to drop one entry."""
_MAX_READERS = 512
_KEYS = 256
"""To read so many takes a tenth of a millisecond."""
_MARK_BYTES = 64
"""By the first of its bytes a sealed blob is known again: checksum and nonce are among them."""


class OtherFormatError(Exception):
    """The file was written by another version of this package, or by something else."""


class StoredRecord(NamedTuple):
    """An entry, expired or not."""

    key: bytes
    value: bytes
    expires_at: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """The file in numbers. Sizes are in bytes."""

    entries: int
    used_bytes: int
    """Pages that hold entries, their indexes and blobs."""
    free_bytes: int
    """Pages that are reused before the file grows, those that list them included."""
    file_bytes: int
    map_bytes: int
    """What the file can grow to."""
    readers: int
    """The most slots of LMDB's table of readers that all processes have taken at once."""


def alike(_key: str, _bytes: int) -> float:
    """Return the same worth for every entry, so that what was not read for longest leaves first."""
    return 1.0


class DiskFile:
    """An open file.

    Args:
        folder: holds the file; must exist.
        max_bytes: the file's largest size.
        sync: whether a commit waits until the disk has it.
        compresses: whether values are stored compressed.
        clock: returns Unix seconds.
        worth: what keeping an entry is worth, from its key and its bytes in the file.
        seal: with which values and blobs are sealed, if they are.
        reads_values: whether values and blobs are read; else a sealed file needs no `seal`.

    Raises:
        OtherFormatError: the file has another format.
        SealError: the file is sealed otherwise.
        lmdb.Error: LMDB can't open it.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        sync: bool = True,
        compresses: bool = False,
        clock: Callable[[], float] = time.time,
        worth: Callable[[str, int], float] = alike,
        seal: Cipher | None = None,
        reads_values: bool = True,
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.reserve_bytes = reserve_bytes(max_bytes)
        self._drops = min(self.reserve_bytes // _DROP_BYTES, _DROPS)
        self._sync = sync
        self._clock = clock
        self._worth = worth
        self._seal, self._reads_values = seal, reads_values
        self._format = _format(sealed=seal is not None)
        self._codec = Codec(compresses=compresses, seal=seal)
        self._lock = threading.Lock()
        # How a sealed blob begins, as it is stored, and as it is.
        self._opened: dict[bytes, tuple[bytes, bytes]] = {}
        self._open()

    def _open(self) -> None:
        env = lmdb.open(
            str(self.folder),
            map_size=self.max_bytes,
            max_dbs=len(Databases._fields),
            max_readers=_MAX_READERS,
            mode=0o600,
            sync=self._sync,
        )
        try:
            # One transaction, so no other process sees a file without its format.
            with env.begin(write=True) as txn:
                is_new = not txn.stat()["entries"]
                if not is_new:
                    found = _found_format(env, txn)
                    if self._reads_values:
                        _check_seal(env, txn, found, self._seal)
                    self._format = found
                names = [name.encode() for name in Databases._fields]
                self.dbs = Databases(*(env.open_db(name, txn=txn) for name in names))
                txn.put(_FORMAT_NAME, self._format, db=self.dbs.meta, overwrite=False)
                if self._seal is not None and is_new:
                    kept = pack_blob(_SEAL_NAME, self._seal.begin())
                    txn.put(_SEAL_NAME, kept, db=self.dbs.meta)
            env.reader_check()
        except BaseException:
            env.close()
            raise
        self.env = env

    def reopen(self) -> None:
        """Open the file again, after an error from which LMDB does not recover."""
        with self._lock:
            self.env.close()
            self._open()

    def close(self) -> None:
        """Sync and close."""
        with self._lock:
            self.env.sync(True)
            self.env.close()

    def get(self, key: bytes) -> tuple[bytes, float] | None:
        """Return an entry's value and its expiry (Unix s), which may have passed.

        Raises:
            ValueError: it does not verify.
            lmdb.MapResizedError: another process has grown the map; the next write adopts it,
                even an empty one.
        """
        # As a buffer, the record is copied only once.
        with self._lock, self.env.begin(db=self.dbs.entries, buffers=True) as txn:
            record = _record(txn, key)
            if record is None:
                return None
            coding, expires_at, _, payload = unpack(key, record)
            return self._decode(txn, key, coding, payload), expires_at

    def holds(self, key: bytes) -> bool:
        """Return whether there is a record under `key`, which may be damaged or have expired.

        Raises:
            lmdb.Error: that can't be told.
        """
        with self._lock, self.env.begin(db=self.dbs.entries, buffers=True) as txn:
            return _record(txn, key) is not None

    def scopes(self) -> list[bytes]:
        """Return the scopes of all entries."""
        with self._lock, self.env.begin() as txn, txn.cursor(db=self.dbs.order) as order:
            return [scope for scope, _ in lowest_of_scopes(order)]

    def ranks_below(self, scope: bytes, below: bytes | None, most: int) -> list[tuple[bytes, int]]:
        """Return up to `most` of a scope's ranks, from the highest or from below one.

        Each comes with the sequence number of its entry.
        """
        ranks: list[tuple[bytes, int]] = []
        with self._lock, self.env.begin() as txn, txn.cursor(db=self.dbs.order) as order:
            above = order.set_range(scope + (ABOVE if below is None else below))
            found = order.prev() if above else order.last()
            while found and len(ranks) < most:
                found_scope, rank = unpack_order(order.key())
                if found_scope != scope:
                    break
                ranks.append((rank, unpack_sequence(order.value())))
                found = order.prev()
        return ranks

    def numbered(self, sequence: int) -> StoredRecord | None:
        """Return the entry with that sequence number, or `None` if it is gone or damaged."""
        with self._lock, self.env.begin(buffers=True) as txn:
            place = place_of(txn, self.dbs, sequence)
            if place is None or (record := txn.get(place.key, db=self.dbs.entries)) is None:
                return None
            with contextlib.suppress(ValueError):
                coding, expires_at, _, payload = unpack(place.key, record)
                return StoredRecord(
                    place.key, self._decode(txn, place.key, coding, payload), expires_at
                )
        return None

    def all_keys(self) -> list[bytes]:
        """Return all keys."""
        with self._lock, self.env.begin(db=self.dbs.entries) as txn:
            return list(txn.cursor().iternext(values=False))

    def keys_after(self, key: bytes) -> list[bytes]:
        """Return the next keys in their order, as many as can be read at once; none at the end."""
        with (
            self._lock,
            self.env.begin() as txn,
            txn.cursor(db=self.dbs.entries) as cursor,
        ):
            if not cursor.set_range(key + b"\0"):
                return []
            return list(islice(cursor.iternext(values=False), _KEYS))

    def load(self, name: bytes, unless: bytes | None = None) -> bytes | None:
        """Return a blob, or `None` if there is none, or if it begins with `unless`.

        A sealed one is opened once, as long as it stays the same and `unless` is given.

        Raises:
            ValueError: it does not verify.
        """
        with self._lock, self.env.begin(db=self.dbs.meta, buffers=True) as txn:
            data = txn.get(name)
            if data is None:
                return None
            if unless and self._seal is None and begins_with(data, unless):
                return None
            mark = bytes(data[:_MARK_BYTES])
            known = self._opened.get(name)
            if unless and known is not None and known[0] == mark and known[1].startswith(unless):
                return None
            blob = self._codec.decode_blob(name, unpack_blob(name, data))
            if unless is not None and self._seal is not None:
                self._opened[name] = mark, blob[:_MARK_BYTES]
            return None if unless and blob.startswith(unless) else blob

    def statistics(self) -> Statistics:
        """Count pages and readers."""
        with self._lock:
            with self.env.begin() as txn:
                used = used_bytes(txn, self.dbs)
                entries = txn.stat(self.dbs.entries)["entries"]
            info = self.env.info()
            page_bytes = self.env.stat()["psize"]
        return Statistics(
            entries=entries,
            used_bytes=used,
            free_bytes=(info["last_pgno"] + 1) * page_bytes - used,
            file_bytes=self._file_bytes(),
            map_bytes=info["map_size"],
            readers=info["num_readers"],
        )

    def _file_bytes(self) -> int:
        try:
            return (self.folder / DATA).stat().st_size
        except FileNotFoundError:
            return 0

    # What follows is the writing thread's.

    def write(self, changes: Sequence[Change], read: Collection[str]) -> Outcome:
        """Commit `changes`, raise the priority of what was `read`, expire, and evict.

        Raises:
            lmdb.MapFullError: evicting did not make room enough.
            lmdb.Error: the disk is full or fails; nothing has changed.
        """
        target_bytes = self.max_bytes - self.reserve_bytes
        outcome = Outcome()
        for attempt in range(1, _ROUNDS + 1):
            try:
                outcome = outcome.then(self._transact(changes, read, target_bytes, self._drops))
            except lmdb.MapResizedError:
                with self._lock:
                    self.env.set_mapsize(0)
            except lmdb.MapFullError:
                # A reader that died may hold on to pages that have been freed since.
                self.env.reader_check()
                # Pages may be free and no run of them long enough for a value, so what counts is
                # what is in use now, and not what should be.
                more_bytes = attempt * self.reserve_bytes // _ROUNDS
                target_bytes = min(target_bytes, self._used_bytes()) - more_bytes
                # What is being stored has to stay.
                target_bytes = max(target_bytes, self.reserve_bytes // 4)
                try:
                    outcome = outcome.then(self.evict(target_bytes))
                    self._release_pages()
                except lmdb.MapFullError:
                    # Readers keep pages that have been freed, but not for long; one may be in a
                    # process that stands still for a moment.
                    if attempt < _ROUNDS:
                        time.sleep(_READER_S * 2 ** (attempt - 1))
            else:
                if outcome.used_bytes > target_bytes + self.reserve_bytes // 4:
                    outcome = outcome.then(self.evict(target_bytes))
                if not self._sync and any(change.update is not None for change in changes):
                    self.env.sync(True)
                return outcome
        raise lmdb.MapFullError("the disk tier could not make room")

    def evict(self, target_bytes: int) -> Outcome:
        """Evict, in as many transactions as it takes, until `target_bytes` hold the rest.

        Raises:
            lmdb.MapFullError: there is no room even to evict.
        """
        outcome, drops = Outcome(), self._drops
        while True:
            try:
                done = self._transact((), (), target_bytes, drops)
            except lmdb.MapFullError:
                if drops == 1:
                    raise
                drops //= 2
                continue
            outcome = outcome.then(done)
            if done.used_bytes <= target_bytes or not done.evicted:
                return outcome

    def _used_bytes(self) -> int:
        with self.env.begin() as txn:
            return used_bytes(txn, self.dbs)

    def _release_pages(self) -> None:
        """Make a commit that changes nothing: LMDB reuses what the one before the last freed."""
        with self.env.begin(write=True, db=self.dbs.meta) as txn:
            txn.put(_FORMAT_NAME, self._format)

    def check(self) -> None:
        """Free the slots of readers that have died, and see that the file is still there.

        Raises:
            FileNotFoundError: somebody has removed it.
        """
        self.env.reader_check()
        if not (self.folder / DATA).exists():
            why = "somebody has removed its file, and a restart makes a new one"
            raise FileNotFoundError(errno.ENOENT, why)

    def _transact(
        self, changes: Sequence[Change], read: Collection[str], target_bytes: int, drops: int
    ) -> Outcome:
        if not self._codec.has_dictionary:
            self._train(changes)
        with self.env.begin(write=True, buffers=True) as txn:
            work = Transaction(txn, self.dbs, self._codec, self._worth)
            work.expire(self._clock(), drops)
            for change in changes:
                work.apply(change)
            work.raise_priorities(read)
            work.evict(target_bytes, drops)
            return work.end()

    def _train(self, changes: Sequence[Change]) -> None:
        """Make the file's dictionary, once enough values have been seen, if it has none."""
        for change in changes:
            if change.value is None or (made := self._codec.sample(change.value)) is None:
                continue
            with self.env.begin(write=True, db=self.dbs.meta) as txn:
                data = pack_blob(_DICTIONARY_NAME, self._codec.encode_blob(_DICTIONARY_NAME, made))
                txn.put(_DICTIONARY_NAME, data, overwrite=False)
        with self.env.begin(buffers=True) as txn:
            self.learn(txn)

    def learn(self, txn: "lmdb.Transaction[memoryview]") -> bool:
        """Use the file's dictionary, which any process may have made. Returns whether it can."""
        if not self._codec.has_dictionary and not self._is_locked:
            data = txn.get(_DICTIONARY_NAME, db=self.dbs.meta)
            with contextlib.suppress(ValueError):
                if data is not None:
                    dictionary = unpack_blob(_DICTIONARY_NAME, data)
                    self._codec.use(self._codec.decode_blob(_DICTIONARY_NAME, dictionary))
        return self._codec.has_dictionary

    @property
    def _is_locked(self) -> bool:
        """Whether the file is sealed, and we have no key."""
        return self._seal is None and self._format == _format(sealed=True)

    def _decode(
        self, txn: "lmdb.Transaction[memoryview]", key: bytes, coding: int, payload: memoryview
    ) -> bytes:
        if coding % SEALED == ZSTD_DICTIONARY and not self._codec.has_dictionary:
            self.learn(txn)
        return self._codec.decode(key, coding, payload)


def check_seal(folder: Path, seal: Cipher | None) -> None:
    """Look whether a file that nobody writes is sealed with `seal`; it isn't touched.

    Raises:
        SealError: it is sealed otherwise.
        OtherFormatError: it has another format.
        lmdb.Error: LMDB can't open it.
    """
    with (
        lmdb.open(str(folder), max_dbs=1, readonly=True, lock=False, create=False) as env,
        env.begin() as txn,
    ):
        _check_seal(env, txn, _found_format(env, txn), seal)


def _found_format(env: lmdb.Environment, txn: "lmdb.Transaction[bytes]") -> bytes:
    try:
        meta = env.open_db(_META, txn=txn, create=False)
    except lmdb.NotFoundError:
        raise OtherFormatError("it is of another format") from None
    found = txn.get(_FORMAT_NAME, db=meta)
    if found not in (_format(sealed=False), _format(sealed=True)):
        raise OtherFormatError(f"its format is {found!r}, not {FORMAT}")
    return found


def _check_seal(
    env: lmdb.Environment, txn: "lmdb.Transaction[bytes]", found: bytes, seal: Cipher | None
) -> None:
    if found != _format(sealed=seal is not None):
        raise EncryptionKeyError(
            "it is encrypted, and there is no key"
            if seal is None
            else "it is not encrypted, and only a new file can be; use another folder for that"
        )
    if seal is not None:
        kept = txn.get(_SEAL_NAME, db=env.open_db(_META, txn=txn, create=False))
        try:
            seal.resume(unpack_blob(_SEAL_NAME, memoryview(kept or b"")))
        except ValueError as exc:
            raise OtherFormatError("what its encryption needs is damaged") from exc


def reserve_bytes(max_bytes: int) -> int:
    """Return the room for pages that a transaction copies and for gaps between pages."""
    return min(max_bytes // 4, _MAX_RESERVE_BYTES)


def _record(txn: "lmdb.Transaction[memoryview]", key: bytes) -> memoryview | None:
    try:
        return txn.get(key)
    except lmdb.BadValsizeError:
        # No entry has such a key.
        return None


def _format(*, sealed: bool) -> bytes:
    return b"%d sealed" % FORMAT if sealed else b"%d" % FORMAT
