"""The disk tier's writer: one thread, many changes a transaction (group commit).

It owns the queue, the interval of commits, and what happens when the disk fails: the batch fails
and is counted, one error is logged per outage, and after an error of the disk the next attempt
waits, longer each time. Invariant: the thread ends only by `close`, and every change that was
submitted is settled once.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

import lmdb

from tiers.disk.file import DiskFile
from tiers.disk.recovery import UntrustedError
from tiers.disk.transaction import Change, Outcome

logger = logging.getLogger(__name__)

_BATCH_CHANGES = 256
_READS = 1024
_IDLE_S = 10.0
_PAUSE_S = 0.002
_FIRST_DELAY_S = 1.0
_LAST_DELAY_S = 60.0
_CHECKED_EVERY_S = 5.0


class Durability(StrEnum):
    """What is true when a write has returned."""

    COMMIT = "commit"
    """The entry is on the disk, so neither a kill nor a power failure loses it."""
    INTERVAL = "interval"
    """The entry is queued. What is queued is committed to the disk when `interval_s` have passed
    since the last commit, or sooner, so a kill or a power failure loses what was written in the
    last interval and during the commit after it, and the file stays whole."""
    OS = "os"
    """The entry is in the system's page cache, so a kill does not lose it; the file is synced when
    it is closed. After a power failure entries may be missing, or the file be damaged: the next
    start verifies it in the background, and starts empty if it can't be used."""


@dataclass(slots=True, eq=False)
class Submission:
    """A change on its way to the disk, and the future of its caller, if that waits."""

    change: Change
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[bool] | None"

    @property
    def bytes(self) -> int:
        """What it counts in limits."""
        return len(self.change.key) + len(self.change.value or b"")


class _Command(Enum):
    COMMIT = auto()
    END = auto()


@dataclass(slots=True)
class _Outage:
    """A time during which batches fail."""

    failed_writes: int = 0
    delay_s: float = 0.0
    until: float = 0.0
    """On the monotonic clock; nothing is stored before."""


class Writer:
    """The thread that writes, and first opens the file.

    Args:
        open_file: opens it; called in the thread.
        settle: called in the event loop with each batch and its outcome, `None` if it failed.
        distrust: called in the thread when something fails that a full disk doesn't explain.
        interval_s: the least time between commits.
    """

    def __init__(
        self,
        open_file: Callable[[], DiskFile],
        settle: Callable[[Sequence[Submission], Outcome | None], None],
        distrust: Callable[[], None],
        interval_s: float,
    ) -> None:
        self.opened: Future[DiskFile] = Future()
        self._open_file = open_file
        self._settle = settle
        self._distrust = distrust
        self._interval_s = interval_s
        self._committed_at = 0.0
        self._checked_at = time.monotonic()
        # SimpleQueue is faster, but before Python 3.13 it may wait for ever where the timeout is as
        # short as the rest of an interval.
        self._queue: queue.Queue[Submission | _Command] = queue.Queue()
        self._is_woken = False
        self.read: deque[str] = deque(maxlen=_READS)
        """Keys of entries that were read, whose priority rises with a later commit; append only.
        The oldest are forgotten."""
        self._outage: _Outage | None = None
        self._is_broken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="disk-writer", daemon=True)
        self._thread.start()

    @property
    def is_pausing(self) -> bool:
        """Whether the disk has failed so lately that nothing should be stored."""
        return (outage := self._outage) is not None and time.monotonic() < outage.until

    def submit(self, submission: Submission) -> None:
        """Queue a change."""
        self._queue.put(submission)

    def wake(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Commit now, even if nothing is queued: a commit adopts the size that the map is to have.

        Args:
            loop: gets the outcome, where no change has come from one yet.
        """
        self._loop = loop or self._loop
        if not self._is_woken:
            self._is_woken = True
            self._queue.put(_Command.COMMIT)

    async def close(self) -> None:
        """Commit what is queued and end the thread."""
        self._queue.put(_Command.END)
        await asyncio.to_thread(self._thread.join)
        # Let the last batch settle.
        await asyncio.sleep(0)

    def _run(self) -> None:
        try:
            file = self._open_file()
        except Exception as exc:
            if not isinstance(exc, InterruptedError | UntrustedError):
                trace = None if isinstance(exc, OSError) else exc
                logger.error("the disk tier can't be opened: %s", exc, exc_info=trace)
            self.opened.set_exception(exc)
            self._refuse()
            return
        self.opened.set_result(file)
        going = True
        while going:
            batch, going = self._gather(file)
            outcome = self._commit(file, batch)
            # Asked before the report, which lets a caller who stores alone go on.
            several_store = len(batch) > 1 or not self._queue.empty()
            self._report(batch, outcome)
            if several_store or file.is_shrinking:
                # What comes meanwhile is one commit, which costs the event loop less than one each.
                time.sleep(_PAUSE_S)

    def _gather(self, file: DiskFile) -> tuple[list[Submission], bool]:
        """Return what goes into the next commit, and whether another may follow."""
        batch: list[Submission] = []
        batch_bytes = 0
        wait_s = 0.0 if file.is_shrinking and not self.is_pausing else _IDLE_S
        while len(batch) < _BATCH_CHANGES and batch_bytes < file.reserve_bytes // 4:
            try:
                submission = self._queue.get(wait_s > 0, max(wait_s, 0.0))
            except queue.Empty:
                break
            if submission is _Command.END:
                return batch, False
            if submission is _Command.COMMIT:
                self._is_woken = False
                break
            batch.append(submission)
            batch_bytes += submission.bytes
            wait_s = self._committed_at + self._interval_s - time.monotonic()
        return batch, True

    def _commit(self, file: DiskFile, batch: Sequence[Submission]) -> Outcome | None:
        try:
            if time.monotonic() - self._checked_at > _CHECKED_EVERY_S:
                file.check()
                self._checked_at = time.monotonic()
            outcome = file.write([each.change for each in batch], self._take_read())
        except Exception as exc:  # The thread has to go on, whatever it is.
            self._failed(file, batch, exc)
            return None
        self._committed_at = time.monotonic()
        if batch and (outage := self._outage) is not None:
            self._outage = None
            logger.warning("the disk tier stores again; %d writes failed", outage.failed_writes)
        return outcome

    def _failed(self, file: DiskFile, batch: Sequence[Submission], exc: Exception) -> None:
        is_known = isinstance(exc, lmdb.Error | OSError)
        outage = self._outage
        if outage is None:
            outage = self._outage = _Outage()
            why = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            text = "the disk tier can't store, and tries again: %s; %d writes have failed so far"
            logger.error(text, why, len(batch), exc_info=None if is_known else exc)
        outage.failed_writes += len(batch)
        if not isinstance(exc, lmdb.DiskError | lmdb.MapFullError | OSError):
            self._distrust()
        if is_known:
            outage.delay_s = min(max(outage.delay_s * 2, _FIRST_DELAY_S), _LAST_DELAY_S)
            outage.until = time.monotonic() + outage.delay_s
        if isinstance(exc, lmdb.PanicError) or self._is_broken:
            # LMDB refuses every call until the file is opened again.
            self._is_broken = True
            with contextlib.suppress(lmdb.Error):
                file.reopen()
                self._is_broken = False

    def _take_read(self) -> list[str]:
        """Return the keys that were read, each once, in the order of their last reads."""
        read: list[str] = []
        with contextlib.suppress(IndexError):
            while True:
                read.append(self.read.pop())
        return list(dict.fromkeys(read))[::-1]

    def _refuse(self) -> None:
        while (submission := self._queue.get()) is not _Command.END:
            if submission is not _Command.COMMIT:
                self._report([submission], None)

    def _report(self, batch: Sequence[Submission], outcome: Outcome | None) -> None:
        if batch:
            self._loop = batch[0].loop
        if self._loop is not None:
            # The loop may have been closed under us at exit.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._settle, batch, outcome)
