"""The file of the index: how it is opened, its format, its transactions, and what damage does.

LMDB reads by a map, and a file that somebody has truncated would kill the process by SIGBUS. So
each transaction first compares the file's size with its pages. Damage is an `lmdb.Error`, and is
noted in the folder, so that the store is begun anew when it is opened next.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.encryption import Cipher, EncryptionKeyError
from tiers.lmdb_pages import holds_all_pages, page_problems
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES
from tiers.prefix_kv.folder import Folder
from tiers.prefix_kv.index.snapshot import STATE, IndexState, KnownPurges, PrefixDatabases, Snapshot
from tiers.prefix_kv.index.transaction import IndexTransaction, WriterSettings
from tiers.prefix_kv.record import FORMAT

INDEX, LOCK = "index.mdb", "index.mdb-lock"
_FORMAT, _CIPHER = b"format", b"cipher"
_PURPOSE = b"tierserve prefix tier"
_MAX_READERS = 512
_LOCK_BYTES = 64 * 1024
"""No less than the file takes with which LMDB keeps so many readers."""
_MIN_INDEX_BYTES, _INDEX_PART = 8 * 1024**2, 64
"""The index may take a 64th of all bytes: a record takes less than a kilobyte, a block far more."""
_SKIPPED = 2**40
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError)


class ForeignIndexError(Exception):
    """The folder has another program's file."""


class OtherVersionError(Exception):
    """The file was written by another version of this package."""


class ReplacedIndexError(lmdb.Error):
    """Another process has begun the store anew; only who opens it again sees that."""


class FileLimits(NamedTuple):
    """The parts of a store's largest size."""

    index_bytes: int
    data_pages: int

    @classmethod
    def of(cls, max_bytes: int) -> "FileLimits":
        """Return how the bytes are divided."""
        index_bytes = max(max_bytes // _INDEX_PART, _MIN_INDEX_BYTES) // PAGE_BYTES * PAGE_BYTES
        data_bytes = max_bytes - index_bytes - _LOCK_BYTES
        return cls(index_bytes, max(data_bytes // PAGE_BYTES, 0))


class IndexFile:
    """An open file.

    Args:
        folder: holds it; is locked by the caller while this opens it.
        limits: its size, and that of the data file.
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
        key: bytes | None,
        ttl_s: float,
        clock: Callable[[], float],
        *,
        syncs: bool,
    ) -> None:
        self.cipher = None if key is None else Cipher(key, _PURPOSE)
        self._folder, self._clock = folder, clock
        self._purges = KnownPurges()
        path = folder.path / INDEX
        self._env = lmdb.open(
            str(path), subdir=False, map_size=limits.index_bytes, max_readers=_MAX_READERS,
            max_dbs=len(PrefixDatabases._fields), mode=0o600, sync=syncs,
        )  # fmt: skip
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._page_bytes = self._env.stat()["psize"]
            pages = limits.index_bytes // self._page_bytes
            self.reserve_pages = pages // 2
            """Pages for the copies that transactions make, and for gaps in the others."""
            self._settings = WriterSettings(folder.owner, ttl_s, pages - self.reserve_pages)
            self._open(limits.data_pages)
        except BaseException:
            self.close()
            raise

    def _open(self, data_pages: int) -> None:
        self._env.reader_check()
        with self._env.begin(write=True) as txn:
            is_new = not txn.stat()["entries"]
            if not is_new:
                self._check_format(txn)
            names = (name.encode() for name in PrefixDatabases._fields)
            self.dbs = PrefixDatabases(*(self._env.open_db(name, txn=txn) for name in names))
            if is_new:
                self._begin(txn, data_pages)
        with self.writing() as write:
            # Where the folder is a copy, the other one goes on with other numbers, which matters
            # to the encryption.
            write.skip_sequences(secrets.randbelow(_SKIPPED))
            write.free_reservations(self._folder.is_alive)
            write.fit(data_pages)

    def _check_format(self, txn: "lmdb.Transaction[bytes]") -> None:
        try:
            meta = self._env.open_db(b"meta", txn=txn, create=False)
        except (lmdb.NotFoundError, lmdb.IncompatibleError):
            raise ForeignIndexError("it is of another program") from None
        if (found := txn.get(_FORMAT, db=meta)) != b"%d" % FORMAT:
            raise OtherVersionError(f"its format is {found!r}, not {FORMAT}")
        kept = txn.get(_CIPHER, db=meta)
        if (kept is None) != (self.cipher is None):
            raise EncryptionKeyError(
                "it is encrypted, and there is no key"
                if self.cipher is None
                else "it is not encrypted, and only a new one can be; use another folder for that"
            )
        if self.cipher is not None and kept is not None:
            self.cipher.resume(kept)

    def _begin(self, txn: "lmdb.Transaction[bytes]", data_pages: int) -> None:
        txn.put(_FORMAT, b"%d" % FORMAT, db=self.dbs.meta)
        txn.put(STATE, IndexState(limit=data_pages).pack(), db=self.dbs.meta)
        if self.cipher is not None:
            txn.put(_CIPHER, self.cipher.begin(), db=self.dbs.meta)

    def close(self) -> None:
        """Close the file; no other thread may use it any more."""
        self._env.close()
        os.close(self._file)

    def size(self) -> int:
        """Return the bytes that the file takes."""
        return os.fstat(self._file).st_size

    @contextmanager
    def reading(self) -> Iterator[Snapshot]:
        """Read, without waiting for anybody."""
        with self._noting_damage():
            self._require_whole()
            with self._env.begin() as txn:
                yield Snapshot(txn, self.dbs, self._purges, self.cipher, self._clock())

    @contextmanager
    def writing(self) -> Iterator[IndexTransaction]:
        """Write, once others have; all of it is committed, or nothing."""
        with self._folder.writing(), self._noting_damage():
            self._require_whole()
            with self._env.begin(write=True) as txn:
                write = IndexTransaction(
                    txn, self.dbs, self._purges, self.cipher, self._clock(), self._settings
                )
                yield write
                write.finish()

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError:
            # A reader that died keeps pages that have been freed since, until the next write.
            self._env.reader_check()
            raise
        except _DAMAGE:
            with suppress(OSError):
                self._folder.mark_damaged()
            raise

    def _require_whole(self) -> None:
        found = os.fstat(self._file)
        if not found.st_nlink:
            raise ReplacedIndexError("the prefix blocks were begun anew by another process")
        # The number of pages is read from the first two of them.
        is_whole = found.st_size >= 2 * self._page_bytes and (
            found.st_size >= (self._env.info()["last_pgno"] + 1) * self._page_bytes
        )
        if not is_whole:
            raise lmdb.CorruptedError("it is shorter than its pages")


def why_not_usable(folder: Folder, limits: FileLimits) -> str | None:
    """Return why the index in a folder must not be opened; `None` if it may, or isn't there."""
    path = folder.path / INDEX
    if not path.exists() or not (size := path.stat().st_size):
        return None
    if folder.is_damaged:
        return "LMDB has found damage"
    if size > limits.index_bytes:
        return f"the index has {size} bytes, more than its part of the limit"
    if not holds_all_pages(path):
        return "the index is shorter than its pages, or none at all"
    if folder.may_kill:
        if problems := page_problems(path):
            return f"the index has killed processes: {problems[0]} ({len(problems)} problems)"
        folder.mark_whole()
    return None


def has_only_data(folder: Path) -> bool:
    """Return whether there is a data file without an index."""
    data = folder / DATA
    return not (folder / INDEX).exists() and data.exists() and data.stat().st_size > 0


def remove_files(folder: Path) -> None:
    """Remove a store's files; who has them open goes on with them, and they go with it."""
    for name in (INDEX, LOCK, DATA):
        (folder / name).unlink(missing_ok=True)
