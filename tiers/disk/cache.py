"""The disk tier's backend: entries in an LMDB file that survive restarts, bounded on disk.

One thread writes, many entries a transaction; the event loop reads inline, since a warm read takes
microseconds. Invariants: a read sees the last write, from the queue if it isn't committed, or
nothing if that was lost; the file never outgrows `max_bytes`; a record that doesn't verify is a
miss.
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

from tiers.backend import ByteCache
from tiers.disk.encryption import Cipher, EncryptionKeyError
from tiers.disk.file import (
    MAX_KEY_BYTES,
    DiskFile,
    OtherFormatError,
    Statistics,
    StoredRecord,
    alike,
    reserve_bytes,
)
from tiers.disk.recovery import Recovery
from tiers.disk.transaction import Change, Outcome
from tiers.disk.writer import Durability, Submission, Writer

logger = logging.getLogger(__name__)

MIN_BYTES = 1024 * 1024

_PENDING_BYTES = 64 * 1024 * 1024
# About 500 bytes each.
_MOST_LOST = 8192
_DROPPED_AT_ONCE = 256
# Of each scope so many are in memory at once.
_RANKS = 32
_UNUSABLE = (OtherFormatError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError)


_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class _GrownError(OSError):
    """Another process has just grown the file, and the writer hasn't adopted that yet."""


def _is_key(key: str) -> bool:
    return 0 < len(key.encode()) <= MAX_KEY_BYTES


class DiskCache(ByteCache):
    """A cache in the LMDB file below the folder `path`, which never exceeds `max_bytes`.

    A file that was closed cleanly, or a new one, is open when the constructor returns. Any other
    is verified first, by another process in the background: until then every read is a miss, but
    for what has been written since, and a write is queued and reported as not stored. A file that
    can't be trusted is set aside under another name, and the cache starts empty.

    What is worth least leaves first, and what hasn't been read for long is worth less. What has
    expired leaves before that. Several processes may use one folder, each through one cache; of
    several limits the smallest holds for the entries, and the largest for the file. Processes of
    another PID namespace wait until these have gone: until then, reads are misses and writes fail.

    A value larger than a sixteenth of `max_bytes` or 16 MiB, or a key of more than 511 bytes, is
    refused; so is everything for a while after the disk has failed. What the file holds under the
    key of a change that was lost is a miss from then on, and is dropped as soon as the disk stores
    again, or at the close; only where neither happens may the next start find it again.

    Args:
        path: made, private to this user, if it isn't there.
        max_bytes: at least `MIN_BYTES`.
        durability: what is true when a write has returned.
        compresses: whether values take less of the file, and more time to be read.
        interval_s: seconds between commits with `Durability.INTERVAL`.
        worth: what keeping an entry is worth, from its key and its bytes on disk, such as its
            frequency times its cost over its bytes. Called in the writer's thread.
        sets_aside: whether a file that can't be trusted gives way to a new one.
        encryption_key: of 32 bytes, if all that may hold text is encrypted in the file.

    Raises:
        OSError: the folder or the file can't be used.
        SealError: the file is encrypted with another key, or it is and should not be, or should
            be and isn't; it stays as it is.
        ValueError: `max_bytes` is too small.
        UntrustedError: the file can't be trusted, and isn't to be set aside.
    """

    NAME = "disk"

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        durability: Durability = Durability.COMMIT,
        interval_s: float = 0.05,
        compresses: bool = False,
        worth: Callable[[str, int], float] = alike,
        sets_aside: bool = True,
        encryption_key: bytes | None = None,
        clock: Callable[[], float] = time.time,
        namespace: str | None = None,
    ) -> None:
        super().__init__(clock=clock, namespace=namespace)
        if max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes must be at least {MIN_BYTES}, not {max_bytes}")
        self.path = path
        self.max_bytes = max_bytes
        self._durability = durability
        self._compresses = compresses
        self._worth = worth
        self._seal = None if encryption_key is None else Cipher(encryption_key)
        self._pending: dict[str, Submission] = {}
        self._pending_bytes = 0
        # Keys whose removal is pending and not queued, in the order in which changes were lost.
        self._lost: dict[str, None] = {}
        self._closed = False
        self._suspect = False
        self._opening = Recovery(path, max_bytes, clock, sets_aside=sets_aside)
        try:
            self._file = self._open() if self._opening.try_now() else None
        except BaseException as exc:
            # One that can't be read with this key hasn't been touched.
            self._opening.release(whole=isinstance(exc, EncryptionKeyError))
            raise
        interval_s = interval_s if durability is Durability.INTERVAL else 0.0
        self._writer = Writer(self._wait_open, self._settle, interval_s)
        self._note_read = self._writer.read.append

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

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        self._check_turn()
        change = Change(key, value, inf if expires_at is None else expires_at)
        if self._refuses(change):
            self.usage.refused += 1
            # Better no entry than the one that this value was to replace.
            if self._file is None:
                self._submit(Change(key, None))
            elif self._may_show(key):
                await self._done(Change(key, None))
            return False
        # Whoever waits learns of a loss, so it needn't be remembered here.
        waits = self._durability is not Durability.INTERVAL or len(self._lost) >= _MOST_LOST
        if self._file is None or not waits:
            self._submit(change)
            return self._file is not None
        return await self._done(change)

    async def touch(self, key: str, expires_at: float | None) -> bool:
        value = self.read(key)
        return value is not None and await self.write(key, value, expires_at)

    async def remove(self, key: str) -> bool:
        self._check_turn()
        change = Change(key, None)
        if self._file is None:
            self._submit(change)
            return False
        if not self._may_show(key):
            return False
        found = self._find(key)
        # What has expired, too: it would be back if the clock were set back.
        if not await self._done(change):
            raise OSError("an entry could not be dropped")
        return found is not None and self._is_alive(found)

    def keys(self) -> Iterable[str]:
        committed = [] if self._file is None else self._file.all_keys()
        return {key.decode() for key in committed} | set(self._pending)

    @property
    def is_open(self) -> bool:
        """Whether entries can be read."""
        return self._file is not None

    @property
    def queued_bytes(self) -> int:
        """What waits to be committed."""
        return self._pending_bytes

    async def opened(self) -> None:
        """Return when the file is open.

        Raises:
            OSError: it can't be opened.
            UntrustedError: it can't be trusted, and isn't to be set aside.
        """
        await asyncio.shield(asyncio.wrap_future(self._writer.opened))

    def hottest(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Yield committed entries with their expiry (Unix s), those of the highest priority first.

        Each is read when it is asked for, so what changes meanwhile may be seen or not; but an
        entry that is being replaced or dropped isn't yielded. What has expired is, so that
        whoever iterates can pause.
        """
        with contextlib.suppress(OSError):
            for _, (key, value, expires_at) in self.ranked():
                yield key.decode(), value, None if expires_at == inf else expires_at

    def ranked(self, below: bytes | None = None) -> Iterator[tuple[bytes, StoredRecord]]:
        """Yield ranks and entries as `hottest` does, but those below a rank.

        Raises:
            OSError: the file can't be read.
        """
        scopes = self._step(DiskFile.scopes) or []
        walks = [self._ranks(scope, below) for scope in scopes]
        for rank, sequence in heapq.merge(*walks, reverse=True):
            found = self._step(DiskFile.numbered, sequence)
            if found is not None and found.key.decode() not in self._pending:
                yield rank, found

    def _ranks(self, scope: bytes, below: bytes | None) -> Iterator[tuple[bytes, int]]:
        # Of many scopes only the first rank of each is needed at first.
        most = 1
        while ranks := self._step(DiskFile.ranks_below, scope, below, most):
            yield from ranks
            below, _ = ranks[-1]
            most = min(2 * most, _RANKS)

    def sorted_keys(self, after: str = "") -> Iterator[str]:
        """Yield keys in their order, those after `after`; each batch is read when it is asked for.

        From the beginning, those come first that wait to be committed, so that each key of an
        entry that is held throughout is yielded, once.

        Raises:
            OSError: the file can't be read.
        """
        queued = set() if after else set(self._pending)
        yield from queued
        last = after.encode()
        while keys := self._step(DiskFile.keys_after, last):
            last = keys[-1]
            yield from (text for key in keys if (text := key.decode()) not in queued)

    async def save(self, name: str, blob: bytes) -> bool:
        """Store a blob beside the entries, for good. Returns whether it is stored."""
        change = Change(f"blob:{name}", blob, is_blob=True)
        return not self._refuses(change) and await self._done(change)

    async def update(self, name: str, change: Callable[[bytes | None], bytes]) -> bool:
        """Replace a blob by what `change` makes of it. Returns whether that is on the disk.

        Nobody else writes meanwhile, in any process. `change` gets `None` if there is no blob, and
        nothing at all, `b""`, if it is damaged. It is called in the writer's thread, and again if
        there was no room. While the file isn't open, this waits for it.
        """
        change_ = Change(f"blob:{name}", None, is_blob=True, update=change)
        return not self._refuses(change_) and await self._done(change_)

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

    def statistics(self) -> Statistics | None:
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
            self._opening.cancel()
        await self._writer.close()
        file, self._file = self._file, None
        is_whole = False
        try:
            if file is not None:
                # Only now: what was queued may have been lost, too.
                await asyncio.to_thread(self._drop_and_close, file, list(self._lost))
                is_whole = not (self._suspect or self._writer.is_suspect)
        finally:
            self._opening.release(whole=is_whole)

    def _step(
        self,
        step: Callable[Concatenate[DiskFile, _Args], _Result],
        *args: _Args.args,
        **kwargs: _Args.kwargs,
    ) -> _Result | None:
        """Return what comes next in a walk through the file; `None` while it isn't open."""
        try:
            return None if (file := self._file) is None else self._read(step, file, *args, **kwargs)
        except _GrownError:
            raise
        except OSError:
            logger.exception("the disk tier's entries can't be read")
            raise

    def _read(
        self, read: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs
    ) -> _Result:
        """Return what `read`, which is the file's, returns.

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
            self._suspect = True
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
        """Return whether `_find` may find something, now or where what it can't read is read."""
        if (submission := self._pending.get(key)) is not None:
            return submission.change.value is not None
        try:
            return self._file is not None and self._read(self._file.holds, key.encode())
        except OSError:
            return True

    def _is_alive(self, found: tuple[bytes, float]) -> bool:
        return found[1] > self.clock()

    def _check_turn(self) -> None:
        """Raise `OSError` where nobody knows how long changes would have to be queued."""
        if self._opening.waits_for_others:
            raise OSError(errno.EBUSY, "its file is open in another container", str(self.path))

    def _refuses(self, change: Change) -> bool:
        value_bytes = len(change.value or b"")
        return (
            self._writer.pausing
            or value_bytes > reserve_bytes(self.max_bytes) // 4
            or not _is_key(change.key)
            or self._pending_bytes + value_bytes > _PENDING_BYTES
        )

    def _drop_damaged(self, key: str) -> None:
        self.usage.damaged += 1
        # There may be more: have the file verified when it is opened next.
        self._suspect = True
        logger.warning("a record of the disk tier did not verify and is dropped")
        with contextlib.suppress(RuntimeError):  # Without a loop nothing can be written.
            self._submit(Change(key, None))

    async def _done(self, change: Change) -> bool:
        done = asyncio.get_running_loop().create_future()
        # Shielded: the thread settles the future even if this caller goes away.
        return self._submit(change, done) and await asyncio.shield(done)

    def _submit(self, change: Change, done: "asyncio.Future[bool] | None" = None) -> bool:
        if self._closed or not _is_key(change.key):
            return False
        submission = Submission(change, asyncio.get_running_loop(), done)
        if not change.is_blob:
            self._pending[change.key] = submission
            self._lost.pop(change.key, None)
        self._pending_bytes += submission.bytes
        self._writer.submit(submission)
        return True

    def _settle(self, batch: Sequence[Submission], outcome: Outcome | None) -> None:
        for submission in batch:
            self._pending_bytes -= submission.bytes
            if self._pending.get(submission.change.key) is submission:
                del self._pending[submission.change.key]
                if outcome is None:
                    self._lose(submission)
            if submission.done is not None and not submission.done.done():
                submission.done.set_result(outcome is not None)
        if outcome is None:
            self.usage.refused += len(batch)
            return
        if batch:
            self._drop_lost()
        self.usage.evictions += outcome.evicted
        self.usage.expirations += outcome.expired
        self.usage.entries = outcome.entries
        self.usage.bytes = outcome.used_bytes

    def _lose(self, submission: Submission) -> None:
        """Hide what the file holds under the key of a change that was lost."""
        key, is_told = submission.change.key, submission.done is not None
        if not (is_told and len(self._lost) >= _MOST_LOST) and self._may_show(key):
            self._pending[key] = Submission(Change(key, None), submission.loop, None)
            self._lost[key] = None

    def _drop_lost(self) -> None:
        for key in list(islice(self._lost, _DROPPED_AT_ONCE)):
            self._submit(Change(key, None))

    def _drop_and_close(self, file: DiskFile, lost: Sequence[str]) -> None:
        try:
            for at in range(0, len(lost), _DROPPED_AT_ONCE):
                file.write([Change(key, None) for key in lost[at : at + _DROPPED_AT_ONCE]], ())
        except (lmdb.Error, OSError) as exc:
            logger.error("the disk tier can't drop what it lost the successors of: %s", exc)
        finally:
            file.close()

    def _wait_open(self) -> DiskFile:
        """Return the open file; in the writer's thread."""
        if (file := self._file) is None:
            self._opening.wait()
            file = self._file = self._open()
            self.usage.damaged += self._opening.damaged
        return file

    def _open(self) -> DiskFile:
        try:
            try:
                file = self._open_file()
            except _UNUSABLE as exc:
                self._opening.replace(str(exc))
                file = self._open_file()
        except lmdb.Error as exc:
            raise OSError(f"can't open the disk tier in {self.path}: {exc}") from exc
        found = file.statistics()
        self.usage.entries, self.usage.bytes = found.entries, found.used_bytes
        return file

    def _open_file(self) -> DiskFile:
        return DiskFile(
            self.path,
            self.max_bytes,
            sync=self._durability is not Durability.OS,
            compresses=self._compresses,
            clock=self.clock,
            worth=self._worth,
            seal=self._seal,
        )
