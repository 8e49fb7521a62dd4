"""The disk tier's backend: entries in an LMDB file that survive restarts, bounded on disk.

One thread writes, many entries a transaction; the event loop reads inline, since a warm read takes
microseconds. Invariants: a read returns what was written last, from the queue if it isn't committed
yet, or a miss if that write failed; the file never exceeds `max_bytes`; a record that doesn't
verify is a miss.

Failed writes are hidden here and in `tiers.resilience.failed_writes`, for two reasons. Here a
deletion takes the place of the failed write: with `Durability.INTERVAL` the caller has continued
long before a commit fails, and every way to read (`hottest`, `keys_after`, …) has to agree. There
the time at which an entry was stored decides, which only a tier knows: a write to a server that
timed out may still arrive.
"""

import asyncio
import contextlib
import errno
import heapq
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import inf
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import lmdb

from tiers.backend import MAX_KEY_BYTES, ByteCache, FileStatistics
from tiers.disk.file import (
    DiskFile,
    OtherFormatError,
    StoredRecord,
    equal_worth,
    reserve_bytes,
)
from tiers.disk.recovery import Recovery
from tiers.disk.transaction import Change, Outcome
from tiers.disk.writer import Durability, Submission, Writer
from tiers.encryption import Cipher
from tiers.entry import Entry

logger = logging.getLogger(__name__)

MIN_BYTES = 1024 * 1024

_PENDING_BYTES = 64 * 1024 * 1024
# About 500 bytes each.
_MAX_FAILED_WRITES = 8192
_DELETED_AT_ONCE = 256
# Of each scope, so many are in memory at once.
_SORT_KEYS = 32
_UNUSABLE = (OtherFormatError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError)
_DAMAGED = (
    lmdb.PageNotFoundError, lmdb.CursorFullError, lmdb.IncompatibleError, lmdb.PanicError
)  # fmt: skip

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class _GrownError(OSError):
    """Another process has just grown the file, and the writer hasn't adopted that yet."""


def _check_size(max_bytes: int) -> None:
    if max_bytes < MIN_BYTES:
        raise ValueError(f"max_bytes must be at least {MIN_BYTES}, not {max_bytes}")


def _is_key(key: str) -> bool:
    return 0 < len(key.encode()) <= MAX_KEY_BYTES


class DiskCache(ByteCache):
    """A cache in the LMDB file below the folder `path`, which never exceeds `max_bytes`.

    The file is open when the constructor returns, also after a kill. Only one that may be damaged
    (see `marks`) is verified first, by another process in the background. Until then every read is
    a miss, but for what has been written since, and a write is queued and reported as not stored. A
    file that can't be used is quarantined, and the cache starts empty.

    What is worth least is evicted first, and what hasn't been read for long is worth less. What has
    expired goes before that. Several processes may use one folder, each through one cache; of
    several limits the smallest holds for the entries, and the largest for the file. Processes of
    another PID namespace wait until these have ended: until then, reads are misses and writes fail.

    A value larger than a sixteenth of `max_bytes` or 16 MiB, or a key of more than 511 bytes, is
    refused; so is everything for a while after the disk has failed. After a failed write, what the
    file holds under its key is a miss, and is deleted as soon as the disk stores again, or at the
    close; only where neither happens may the next start find it again.

    Args:
        path: made, private to this user, if it isn't there.
        max_bytes: at least `MIN_BYTES`.
        durability: what is true when a write has returned.
        compresses: whether values take less of the file, and more time to be read.
        interval_s: seconds between commits with `Durability.INTERVAL`.
        worth: returns the value of keeping an entry, from its key and its bytes on disk, such as
            its frequency times its cost over its bytes. Called in the writer's thread.
        quarantines: whether a file that can't be used gives way to a new one.
        encryption_key: of 32 bytes, if values and blobs are encrypted in the file.

    Raises:
        OSError: the folder or the file can't be used.
        EncryptionKeyError: the file is encrypted with another key; or it is encrypted and no key is
            given; or a key is given and it isn't encrypted. The file stays as it is.
        ValueError: `max_bytes` is too small.
        UntrustedError: the file can't be used, and isn't to be quarantined.
    """

    NAME = "disk"
    is_ordered = True
    path: Path

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        durability: Durability = Durability.COMMIT,
        interval_s: float = 0.05,
        compresses: bool = False,
        worth: Callable[[str, int], float] = equal_worth,
        quarantines: bool = True,
        encryption_key: bytes | None = None,
        clock: Callable[[], float] = time.time,
        namespace: str | None = None,
    ) -> None:
        super().__init__(max_bytes, clock=clock, namespace=namespace)
        _check_size(max_bytes)
        self.path = path
        self._durability = durability
        self._compresses = compresses
        self._worth = worth
        self._cipher = None if encryption_key is None else Cipher(encryption_key)
        self._pending: dict[str, Submission] = {}
        self.queued_bytes = 0
        # Keys whose deletion is in `_pending` and not queued, in the order of the failures.
        self._failed_writes: dict[str, None] = {}
        self._closed = False
        self._recovery = Recovery(path, max_bytes, clock, quarantines=quarantines)
        try:
            self._file = self._open() if self._recovery.try_open() else None
        except BaseException:
            self._recovery.release(closed=False)
            raise
        interval_s = interval_s if durability is Durability.INTERVAL else 0.0
        self._writer = Writer(self._wait_open, self._settle, self._recovery.distrust, interval_s)
        self._note_read = self._writer.read.append

    def resize(self, max_bytes: int) -> None:
        """Take at most `max_bytes` from now on.

        What is too much is evicted by and by, and the next start makes the file smaller. Needs an
        event loop.

        Raises:
            ValueError: `max_bytes` is too small.
        """
        _check_size(max_bytes)
        self.max_bytes = self._recovery.max_bytes = max_bytes
        if (file := self._file) is not None:
            file.max_bytes = max_bytes
        self._writer.wake(asyncio.get_running_loop())

    def read(self, key: str) -> bytes | None:
        found = self._find(key)
        if found is None or not self._is_alive(found):
            return None
        self._note_read(key)
        return found[0]

    def peek(self, key: str) -> tuple[bytes, float | None] | None:
        found = self._find(key)
        if found is None or not self._is_alive(found):
            return None
        value, expires_at = found
        return value, None if expires_at == inf else expires_at

    def peek_entry(self, key: str, now: float) -> Entry | None:
        if (file := self._file) is not None and key not in self._pending:
            try:
                # A hit pays for each call.
                return file.get_entry(key.encode(), now)
            except (ValueError, lmdb.Error):
                # `peek` fails as well, and does what there is to do.
                pass
        return super().peek_entry(key, now)

    def note_read(self, key: str) -> None:
        self._note_read(key)

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        self._check_namespace()
        change = Change(key, value, inf if expires_at is None else expires_at)
        if self._refuses(change):
            self.usage.refused += 1
            # Keep no entry rather than the one that this value replaces.
            if self._file is None:
                self._submit(Change(key, None))
            elif self._may_show(key):
                await self._commit(Change(key, None))
            return False
        # A caller that waits gets the failure, so it needn't be remembered here.
        waits = (
            self._durability is not Durability.INTERVAL
            or len(self._failed_writes) >= _MAX_FAILED_WRITES
        )
        if self._file is None or not waits:
            self._submit(change)
            return self._file is not None
        return await self._commit(change)

    async def touch(self, key: str, expires_at: float | None) -> bool:
        value = self.read(key)
        return value is not None and await self.write(key, value, expires_at)

    async def remove(self, key: str) -> bool:
        self._check_namespace()
        change = Change(key, None)
        if self._file is None:
            self._submit(change)
            return False
        if not self._may_show(key):
            return False
        found = self._find(key)
        # Delete what has expired, too: it would be back if the clock were set back.
        if not await self._commit(change):
            raise OSError("an entry could not be dropped")
        return found is not None and self._is_alive(found)

    def keys(self) -> Iterable[str]:
        committed = [] if self._file is None else self._file.all_keys()
        return {key.decode() for key in committed} | set(self._pending)

    @property
    def is_open(self) -> bool:
        """Whether entries can be read."""
        return self._file is not None

    async def opened(self) -> None:
        """Return when the file is open.

        Raises:
            OSError: it can't be opened.
            UntrustedError: it can't be used, and isn't to be quarantined.
        """
        await asyncio.shield(asyncio.wrap_future(self._writer.opened))

    def hottest(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Yield committed entries with their expiry (Unix s), those of the highest priority first.

        Each is read when it is asked for, so what changes meanwhile may be seen or not; but an
        entry that is being replaced or deleted isn't yielded. Expired ones are, so that a caller
        that iterates can pause.
        """
        with contextlib.suppress(OSError):
            for _, (key, value, expires_at) in self._ranked(None):
                yield key.decode(), value, None if expires_at == inf else expires_at

    def ranked_keys(self, below: bytes | None = None) -> Iterator[tuple[bytes, str]]:
        """Yield the keys of the entries that `hottest` yields, each after its rank.

        Raises:
            OSError: the file can't be read.
        """
        for rank, found in self._ranked(below):
            yield rank, found.key.decode()

    def _ranked(self, below: bytes | None) -> Iterator[tuple[bytes, StoredRecord]]:
        scopes = self._read_if_open(DiskFile.scopes) or []
        walks = [self._sort_keys(scope, below) for scope in scopes]
        for rank, sequence in heapq.merge(*walks, reverse=True):
            found = self._read_if_open(DiskFile.record_of, sequence)
            if found is not None and found.key.decode() not in self._pending:
                yield rank, found

    def _sort_keys(self, scope: bytes, below: bytes | None) -> Iterator[tuple[bytes, int]]:
        # Of many scopes only the first of each is needed at first.
        most = 1
        while found := self._read_if_open(DiskFile.sort_keys_below, scope, below, most):
            yield from found
            below, _ = found[-1]
            most = min(2 * most, _SORT_KEYS)

    def keys_after(self, key: str = "") -> Iterator[str]:
        """Yield keys in their order, those after `key`; each batch is read when it is asked for.

        From the beginning, those come first that wait to be committed, so that each key of an
        entry that is held throughout is yielded, once.

        Raises:
            OSError: the file can't be read.
        """
        queued = set() if key else set(self._pending)
        yield from queued
        last = key.encode()
        while keys := self._read_if_open(DiskFile.keys_after, last):
            last = keys[-1]
            yield from (text for each in keys if (text := each.decode()) not in queued)

    async def save(self, name: str, blob: bytes) -> bool:
        """Store a blob beside the entries. Returns whether it is stored."""
        change = Change(f"blob:{name}", blob, is_blob=True)
        return not self._refuses(change) and await self._commit(change)

    async def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bool:
        """Replace a blob by what `change` makes of it. Returns whether that is on the disk.

        No process writes meanwhile. `change` gets `None` if there is no blob, and `b""` if it is
        damaged. It is called in the writer's thread, and again if there was no room. While the file
        isn't open, this waits for it.
        """
        update = Change(f"blob:{name}", None, is_blob=True, update=change)
        return not self._refuses(update) and await self._commit(update)

    def load(self, name: str) -> bytes | None:
        """Return what was last saved under `name`, or `None` if it is missing or damaged."""
        if self._file is None:
            return None
        try:
            return self._read(self._file.load, f"blob:{name}".encode())
        except ValueError:
            self.usage.damaged += 1
        except _GrownError:
            pass
        except OSError:
            logger.exception("the disk tier can't read what was saved")
        return None

    def reload(self, name: str, known: bytes) -> bytes | None:
        """Return a blob unless it begins with `known`, or there is none. Costs 2 µs if it does.

        Raises:
            ValueError: it is damaged.
            OSError: nothing can be read now.
        """
        if self._file is None:
            raise OSError("the disk tier isn't open")
        return self._read(self._file.load, f"blob:{name}".encode(), known)

    def statistics(self) -> FileStatistics | None:
        """Return the file in numbers, or `None` while it isn't open or has just been grown."""
        try:
            return None if self._file is None else self._read(self._file.statistics)
        except _GrownError:
            return None

    async def _close(self, *args: object, **kwargs: object) -> None:
        if self._closed:
            return
        self._closed = True
        if self._file is None:
            self._recovery.cancel()
        await self._writer.close()
        file, self._file = self._file, None
        closed = False
        try:
            if file is not None:
                # Only now: queued writes may have failed, too.
                await asyncio.to_thread(self._delete_and_close, file, list(self._failed_writes))
                closed = True
        finally:
            self._recovery.release(closed=closed)

    def _read_if_open(
        self,
        read: Callable[Concatenate[DiskFile, _Args], _Result],
        *args: _Args.args,
        **kwargs: _Args.kwargs,
    ) -> _Result | None:
        """Return what `read` returns, or `None` while the file isn't open."""
        try:
            return None if (file := self._file) is None else self._read(read, file, *args, **kwargs)
        except _GrownError:
            raise
        except OSError:
            logger.exception("the disk tier's entries can't be read")
            raise

    def _read(
        self, read: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs
    ) -> _Result:
        """Return what `read`, a method of the file, returns.

        Raises:
            OSError: nothing can be read now.
            ValueError: a record does not verify.
        """
        try:
            return read(*args, **kwargs)
        except lmdb.MapResizedError as exc:
            self._writer.wake()
            raise _GrownError("another process has just grown the disk tier's file") from exc
        except lmdb.Error as exc:
            self._recovery.distrust()
            raise OSError(f"the disk tier's file can't be read: {exc}") from exc

    def _find(self, key: str) -> tuple[bytes, float] | None:
        """Return a value and its expiry (Unix s), which may have passed."""
        if (submission := self._pending.get(key)) is not None:
            change = submission.change
            return None if change.value is None else (change.value, change.expires_at)
        if (file := self._file) is None:
            return None
        try:
            return self._read(file.get, key.encode())
        except ValueError:
            self._drop_damaged(key)
        except _GrownError:
            pass
        return None

    def _may_show(self, key: str) -> bool:
        """Return whether `_find` may find something, now or where a read fails now, later."""
        if (submission := self._pending.get(key)) is not None:
            return submission.change.value is not None
        try:
            return self._file is not None and self._read(self._file.holds, key.encode())
        except OSError:
            return True

    def _is_alive(self, found: tuple[bytes, float]) -> bool:
        return found[1] > self.clock()

    def _check_namespace(self) -> None:
        """Raise `OSError` while the file is open in another PID namespace: that may take long."""
        if self._recovery.waits_for_others:
            raise OSError(errno.EBUSY, "its file is open in another container", str(self.path))

    def _refuses(self, change: Change) -> bool:
        value_bytes = len(change.value or b"")
        return (
            self._writer.is_pausing
            or value_bytes > reserve_bytes(self.max_bytes) // 4
            or not _is_key(change.key)
            or self.queued_bytes + value_bytes > _PENDING_BYTES
        )

    def _drop_damaged(self, key: str) -> None:
        self.usage.damaged += 1
        # There may be more of them.
        self._recovery.distrust()
        logger.warning("a record of the disk tier does not verify and is dropped")
        with contextlib.suppress(RuntimeError):  # Without a loop nothing can be written.
            self._submit(Change(key, None))

    async def _commit(self, change: Change) -> bool:
        """Queue a change, and return whether it was committed."""
        done = asyncio.get_running_loop().create_future()
        # Shielded, since the thread settles the future even if this caller is cancelled.
        return self._submit(change, done) and await asyncio.shield(done)

    def _submit(self, change: Change, done: "asyncio.Future[bool] | None" = None) -> bool:
        if self._closed or not _is_key(change.key):
            return False
        submission = Submission(change, asyncio.get_running_loop(), done)
        if not change.is_blob:
            self._pending[change.key] = submission
            self._failed_writes.pop(change.key, None)
        self.queued_bytes += submission.bytes
        self._writer.submit(submission)
        return True

    def _settle(self, batch: Sequence[Submission], outcome: Outcome | None) -> None:
        for submission in batch:
            self.queued_bytes -= submission.bytes
            if self._pending.get(submission.change.key) is submission:
                del self._pending[submission.change.key]
                if outcome is None:
                    self._hide(submission)
            if submission.done is not None and not submission.done.done():
                submission.done.set_result(outcome is not None)
        if outcome is None:
            self.usage.refused += len(batch)
            return
        if batch:
            self._delete_hidden()
        self.usage.evictions += outcome.evicted
        self.usage.expirations += outcome.expired
        self.usage.entries = outcome.entries
        self.usage.bytes = outcome.used_bytes

    def _hide(self, submission: Submission) -> None:
        """Hide what the file holds under the key of a failed write."""
        key, has_waiter = submission.change.key, submission.done is not None
        is_full = has_waiter and len(self._failed_writes) >= _MAX_FAILED_WRITES
        if not is_full and self._may_show(key):
            self._pending[key] = Submission(Change(key, None), submission.loop, None)
            self._failed_writes[key] = None

    def _delete_hidden(self) -> None:
        for key in list(islice(self._failed_writes, _DELETED_AT_ONCE)):
            self._submit(Change(key, None))

    def _delete_and_close(self, file: DiskFile, keys: Sequence[str]) -> None:
        try:
            for at in range(0, len(keys), _DELETED_AT_ONCE):
                file.write([Change(key, None) for key in keys[at : at + _DELETED_AT_ONCE]], ())
        except (lmdb.Error, OSError) as exc:
            logger.error("the disk tier can't delete what failed writes were to replace: %s", exc)
        finally:
            file.close()

    def _wait_open(self) -> DiskFile:
        """Return the open file; in the writer's thread."""
        if (file := self._file) is None:
            self._recovery.wait()
            file = self._file = self._open()
            # It may have been changed while the file was opened.
            file.max_bytes = self.max_bytes
            self.usage.damaged += self._recovery.damaged
        return file

    def _open(self) -> DiskFile:
        try:
            try:
                file = self._open_file()
            except _UNUSABLE as exc:
                self._recovery.replace(str(exc))
                file = self._open_file()
        except lmdb.Error as exc:
            if isinstance(exc, _DAMAGED):
                self._recovery.distrust()
            raise OSError(f"can't open the disk tier in {self.path}: {exc}") from exc
        self._recovery.marks.mark_open(syncs=self._syncs)
        found = file.statistics()
        self.usage.entries, self.usage.bytes = found.entries, found.used_bytes
        return file

    @property
    def _syncs(self) -> bool:
        return self._durability is not Durability.OS

    def _open_file(self) -> DiskFile:
        return DiskFile(
            self.path,
            self.max_bytes,
            sync=self._syncs,
            compresses=self._compresses,
            clock=self.clock,
            worth=self._worth,
            cipher=self._cipher,
        )
