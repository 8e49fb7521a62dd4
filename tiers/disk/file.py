"""The disk tier's LMDB file: its databases, how they are opened and read, and their statistics.

`transaction` has what a write transaction does to them. Invariant: a thread that uses the map holds
the lock, but for the one that writes, so the map can be replaced or closed safely. LMDB is
described at http://www.lmdb.tech/doc/ and py-lmdb at https://lmdb.readthedocs.io.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.backend import FileStatistics
from tiers.disk.codec import ENCRYPTED, PLAIN, ZSTD_DICTIONARY, Codec
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
    lowest_by_scope,
    row_of,
    used_bytes,
)
from tiers.encryption import Cipher, EncryptionKeyError
from tiers.entry import Entry

DATA = "data.mdb"
_NAMES = (b"entries", b"places", b"order", b"expiries", b"scopes", b"meta")
"""The names in the file of `Databases`, in the same order."""
_META = _NAMES[-1]
_FORMAT_NAME = b"format"
_DICTIONARY_NAME = b"dictionary"
_CIPHER_NAME = b"seal"
_MAX_RESERVE_BYTES = 64 * 1024 * 1024
_ROUNDS = 8
_READER_S = 0.005
_MAX_DROPS = 1024
_DROP_BYTES = 16 * 1024
"""What a transaction may have to copy to drop one entry."""
_MAX_READERS = 512
_KEYS = 256
"""To read so many takes a tenth of a millisecond."""
_HEAD_BYTES = 64
"""The first bytes of an encrypted blob, by which it is known again: with checksum and nonce."""


class OtherFormatError(Exception):
    """The file was written by another version of this package, or by another program."""


class StoredRecord(NamedTuple):
    """An entry, expired or not."""

    key: bytes
    value: bytes
    expires_at: float


def equal_worth(_key: str, _bytes: int) -> float:
    """Return the same worth for every entry, so that the least recently read is evicted first."""
    return 1.0


class DiskFile:
    """An open file.

    Args:
        folder: holds the file; must exist.
        max_bytes: the file's largest size; may be changed at any time, and the next writes follow.
        sync: whether a commit waits until the disk has it.
        compresses: whether values are stored compressed.
        clock: returns Unix seconds.
        worth: what keeping an entry is worth, from its key and its bytes in the file.
        cipher: encrypts values and blobs, if they are encrypted.
        reads_values: whether values and blobs are read; else an encrypted file needs no `cipher`.

    Raises:
        OtherFormatError: the file has another format.
        EncryptionKeyError: the file is encrypted otherwise.
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
        worth: Callable[[str, int], float] = equal_worth,
        cipher: Cipher | None = None,
        reads_values: bool = True,
    ) -> None:
        self.folder = folder
        self.max_bytes = self._mapped_bytes = max_bytes
        self._sync = sync
        self._clock = clock
        self._worth = worth
        self._cipher, self._reads_values = cipher, reads_values
        self._format = _format(encrypted=cipher is not None)
        self._codec = Codec(compresses=compresses, cipher=cipher)
        self._lock = threading.Lock()
        # The first bytes of encrypted blobs: as they are stored, and decrypted.
        self._decrypted: dict[bytes, tuple[bytes, bytes]] = {}
        self._open()

    @property
    def reserve_bytes(self) -> int:
        """The room for pages that a transaction copies and for gaps between pages."""
        return reserve_bytes(self.max_bytes)

    @property
    def _max_drops(self) -> int:
        return min(self.reserve_bytes // _DROP_BYTES, _MAX_DROPS)

    @property
    def is_shrinking(self) -> bool:
        """Whether more writes, even empty ones, have to evict what is beyond a lower limit.

        Each evicts a part, so that what is stored meanwhile needn't wait for all of them.
        """
        return self.max_bytes < self._mapped_bytes

    def _open(self) -> None:
        env = lmdb.open(
            str(self.folder),
            map_size=self._mapped_bytes,
            max_dbs=len(Databases._fields),
            max_readers=_MAX_READERS,
            mode=0o600,
            sync=self._sync,
        )
        try:
            # In one transaction, so that no other process sees a file without its format.
            with env.begin(write=True) as txn:
                is_new = not txn.stat()["entries"]
                if not is_new:
                    found = _read_format(env, txn)
                    if self._reads_values:
                        _check_encryption(env, txn, found, self._cipher)
                    self._format = found
                self.dbs = Databases(*(env.open_db(name, txn=txn) for name in _NAMES))
                txn.put(_FORMAT_NAME, self._format, db=self.dbs.meta, overwrite=False)
                if self._cipher is not None and is_new:
                    kept = pack_blob(_CIPHER_NAME, self._cipher.begin())
                    txn.put(_CIPHER_NAME, kept, db=self.dbs.meta)
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

    def get_entry(self, key: bytes, now: float) -> Entry | None:
        """Return an entry unless it has expired for every use at `now` (Unix s).

        Raises:
            ValueError: it does not verify, or is of another format version.
            lmdb.Error: as in `get`.
        """
        with self._lock, self.env.begin(db=self.dbs.entries, buffers=True) as txn:
            record = _record(txn, key)
            if record is None:
                return None
            coding, expires_at, _, payload = unpack(key, record)
            if expires_at <= now:
                return None
            if coding == PLAIN and self._cipher is None:
                # Out of the map, so that it is copied only once.
                return Entry.decode(payload)
            return Entry.decode(self._decode(txn, key, coding, payload))

    def holds(self, key: bytes) -> bool:
        """Return whether there is a record under `key`, which may be damaged or have expired.

        Raises:
            lmdb.Error: the file can't be read.
        """
        with self._lock, self.env.begin(db=self.dbs.entries, buffers=True) as txn:
            return _record(txn, key) is not None

    def scopes(self) -> list[bytes]:
        """Return the scopes of all entries."""
        with self._lock, self.env.begin() as txn, txn.cursor(db=self.dbs.order) as order:
            return [scope for scope, _ in lowest_by_scope(order)]

    def sort_keys_below(
        self, scope: bytes, below: bytes | None, most: int
    ) -> list[tuple[bytes, int]]:
        """Return up to `most` of a scope's sort keys in `order`, from the highest or below one.

        Each comes with the sequence number of its entry.
        """
        found: list[tuple[bytes, int]] = []
        with self._lock, self.env.begin() as txn, txn.cursor(db=self.dbs.order) as order:
            above = order.set_range(scope + (ABOVE if below is None else below))
            has_row = order.prev() if above else order.last()
            while has_row and len(found) < most:
                found_scope, sort_key = unpack_order(order.key())
                if found_scope != scope:
                    break
                found.append((sort_key, unpack_sequence(order.value())))
                has_row = order.prev()
        return found

    def record_of(self, sequence: int) -> StoredRecord | None:
        """Return the entry with that sequence number, or `None` if it is gone or damaged."""
        with self._lock, self.env.begin(buffers=True) as txn:
            row = row_of(txn, self.dbs, sequence)
            if row is None or (record := txn.get(row.key, db=self.dbs.entries)) is None:
                return None
            with contextlib.suppress(ValueError):
                coding, expires_at, _, payload = unpack(row.key, record)
                value = self._decode(txn, row.key, coding, payload)
                return StoredRecord(row.key, value, expires_at)
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

        An encrypted one is decrypted once, as long as it stays the same and `unless` is given.

        Raises:
            ValueError: it does not verify.
        """
        with self._lock, self.env.begin(db=self.dbs.meta, buffers=True) as txn:
            data = txn.get(name)
            if data is None:
                return None
            if unless and self._cipher is None and begins_with(data, unless):
                return None
            head = bytes(data[:_HEAD_BYTES])
            known = self._decrypted.get(name)
            if unless and known is not None and known[0] == head and known[1].startswith(unless):
                return None
            blob = self._codec.decode_blob(name, unpack_blob(name, data))
            if unless is not None and self._cipher is not None:
                self._decrypted[name] = head, blob[:_HEAD_BYTES]
            return None if unless and blob.startswith(unless) else blob

    def statistics(self) -> FileStatistics:
        """Count pages and readers."""
        with self._lock:
            with self.env.begin() as txn:
                used = used_bytes(txn, self.dbs)
                entries = txn.stat(self.dbs.entries)["entries"]
            info = self.env.info()
            page_bytes = self.env.stat()["psize"]
        return FileStatistics(
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

    # Only the writing thread calls what follows.

    def write(self, changes: Sequence[Change], read: Collection[str]) -> Outcome:
        """Commit `changes`, raise the priority of what was `read`, expire, and evict.

        Raises:
            lmdb.MapFullError: evicting did not make room enough.
            lmdb.Error: the disk is full or fails; nothing has changed.
        """
        limit_bytes = self.max_bytes
        if limit_bytes > self._mapped_bytes:
            self._map(limit_bytes)
        target_bytes = limit_bytes - self.reserve_bytes
        outcome = Outcome()
        for attempt in range(1, _ROUNDS + 1):
            try:
                outcome = outcome.then(self._transact(changes, read, target_bytes, self._max_drops))
            except lmdb.MapResizedError:
                with self._lock:
                    self.env.set_mapsize(0)
            except lmdb.MapFullError:
                # A reader that died may keep pages that have been freed since.
                self.env.reader_check()
                # Pages may be free, but no run of them long enough for a value, so start from what
                # is in use now, and not from what should be.
                more_bytes = attempt * self.reserve_bytes // _ROUNDS
                target_bytes = min(target_bytes, self._used_bytes()) - more_bytes
                # Keep what is being stored.
                target_bytes = max(target_bytes, self.reserve_bytes // 4)
                try:
                    outcome = outcome.then(self.evict(target_bytes))
                    self._release_pages()
                except lmdb.MapFullError:
                    # Readers keep pages that have been freed, for a moment; longer where their
                    # process is stopped.
                    if attempt < _ROUNDS:
                        time.sleep(_READER_S * 2 ** (attempt - 1))
            else:
                outcome = self._evict_rest(outcome, limit_bytes, target_bytes)
                if not self._sync and any(change.update is not None for change in changes):
                    self.env.sync(True)
                return outcome
        raise lmdb.MapFullError("the disk tier could not make room")

    def _evict_rest(self, outcome: Outcome, limit_bytes: int, target_bytes: int) -> Outcome:
        """Evict what a transaction has left too much, if not as one of many for a lower limit."""
        if limit_bytes < self._mapped_bytes:
            if outcome.used_bytes <= target_bytes or not outcome.evicted:
                self._map(limit_bytes)
            return outcome
        if outcome.used_bytes > target_bytes + self.reserve_bytes // 4:
            return outcome.then(self.evict(target_bytes))
        return outcome

    def _map(self, limit_bytes: int) -> None:
        """Let the file grow to `limit_bytes`; LMDB lets it keep the pages that it has."""
        with self._lock:
            self.env.set_mapsize(limit_bytes)
        self._mapped_bytes = limit_bytes

    def evict(self, target_bytes: int) -> Outcome:
        """Evict, in as many transactions as it takes, until `target_bytes` hold the rest.

        Raises:
            lmdb.MapFullError: there is no room even to evict.
        """
        outcome, drops = Outcome(), self._max_drops
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
        """Free the slots of readers that have died, and check that the file is still there.

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
            self.load_dictionary(txn)

    def load_dictionary(self, txn: "lmdb.Transaction[memoryview]") -> bool:
        """Take the file's dictionary, made by any process. Returns whether there is one."""
        if not self._codec.has_dictionary and not self._lacks_key:
            data = txn.get(_DICTIONARY_NAME, db=self.dbs.meta)
            with contextlib.suppress(ValueError):
                if data is not None:
                    dictionary = unpack_blob(_DICTIONARY_NAME, data)
                    self._codec.use_dictionary(
                        self._codec.decode_blob(_DICTIONARY_NAME, dictionary)
                    )
        return self._codec.has_dictionary

    @property
    def _lacks_key(self) -> bool:
        """Whether the file is encrypted, and we have no key."""
        return self._cipher is None and self._format == _format(encrypted=True)

    def _decode(
        self, txn: "lmdb.Transaction[memoryview]", key: bytes, coding: int, payload: memoryview
    ) -> bytes:
        if coding % ENCRYPTED == ZSTD_DICTIONARY and not self._codec.has_dictionary:
            self.load_dictionary(txn)
        return self._codec.decode(key, coding, payload)


def check_encryption(folder: Path, cipher: Cipher | None) -> None:
    """Check that a file that nobody writes is encrypted by `cipher`, without touching it.

    Raises:
        EncryptionKeyError: it is encrypted otherwise.
        OtherFormatError: it has another format.
        lmdb.Error: LMDB can't open it.
    """
    with (
        lmdb.open(str(folder), max_dbs=1, readonly=True, lock=False, create=False) as env,
        env.begin() as txn,
    ):
        _check_encryption(env, txn, _read_format(env, txn), cipher)


def _read_format(env: lmdb.Environment, txn: "lmdb.Transaction[bytes]") -> bytes:
    try:
        meta = env.open_db(_META, txn=txn, create=False)
    except lmdb.NotFoundError:
        raise OtherFormatError("it is of another format") from None
    found = txn.get(_FORMAT_NAME, db=meta)
    if found not in (_format(encrypted=False), _format(encrypted=True)):
        raise OtherFormatError(f"its format is {found!r}, not {FORMAT}")
    return found


def _check_encryption(
    env: lmdb.Environment, txn: "lmdb.Transaction[bytes]", found: bytes, cipher: Cipher | None
) -> None:
    if found != _format(encrypted=cipher is not None):
        raise EncryptionKeyError(
            "it is encrypted, and there is no key"
            if cipher is None
            else "it is not encrypted, and only a new file can be; use another folder for that"
        )
    if cipher is not None:
        kept = txn.get(_CIPHER_NAME, db=env.open_db(_META, txn=txn, create=False))
        try:
            cipher.resume(unpack_blob(_CIPHER_NAME, memoryview(kept or b"")))
        except ValueError as exc:
            raise OtherFormatError("what its encryption needs is damaged") from exc


def reserve_bytes(max_bytes: int) -> int:
    """Return the room for pages that a transaction copies and for gaps between pages."""
    return min(max_bytes // 4, _MAX_RESERVE_BYTES)


def _record(txn: "lmdb.Transaction[memoryview]", key: bytes) -> memoryview | None:
    try:
        return txn.get(key)
    except lmdb.BadValsizeError:
        # LMDB takes no such key.
        return None


def _format(*, encrypted: bool) -> bytes:
    return b"%d sealed" % FORMAT if encrypted else b"%d" % FORMAT
