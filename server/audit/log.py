"""The files of an audit log: sealed lines, written by a thread, synced before they count.

Several processes may write one log, such as the workers of a server: one at a time, under the lock
(flock(2)) of `x.jsonl.last`, which the kernel frees when its holder dies. That file has a copy of
the last line: so the chain goes on behind it, whoever wrote it and wherever the log was moved, and
lines that are cut off the end leave a gap. Invariant: a line that was reported as written is on
disk, and the next one follows it.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from server.audit.chain import BEGINNING, MAX_LINE_BYTES, ChainLink, read_key, read_line, sealed
from server.config.audit import AuditConfig
from server.config.base import ConfigError
from server.telemetry.logs import is_at

logger = logging.getLogger(__name__)

# Entries that wait for the disk. Refused keys come in few lines, and who does an act waits for it.
_MAX_PENDING = 1024
_BATCH = 64
_CLOSE_S = 5

Done = Callable[[OSError | None], None]
"""Is told, by the thread, why an entry wasn't written; `None` if it was."""
_Pending = tuple[Mapping[str, Any], Done]


class AuditLog:
    """The log of one process.

    At `max_bytes` a file is renamed, and of the older ones as many are kept as are configured. A
    line that a kill or a full disk has cut is removed, since nobody was told that it was written.
    Where no line of a file was sealed with our key, the file is renamed, too, and another chain
    begins. What couldn't be written is counted in the next line that can be.

    Args:
        config: describes it.

    Raises:
        ConfigError: its key can't be read.
    """

    def __init__(self, config: AuditConfig) -> None:
        self._path, self._max_bytes, self._files = config.file, config.max_bytes, config.files
        self._key = read_key(config.key_file, "log.audit.key_file")
        self._last = BEGINNING
        # Entries that came too fast, that the disk didn't take, and of both those that a line has.
        self._dropped = self._unwritten = self._told = 0
        self._fails = False
        self._queue: SimpleQueue[_Pending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make the files now.

        Raises:
            ConfigError: they can't be written.
        """
        try:
            with self._locked():
                os.close(self._open())
        except OSError as exc:
            should = f"should be a file that we can write, not {self._path}"
            raise ConfigError([f"log.audit.file: {should}: {exc.strerror or exc}"]) from exc

    def submit(self, entry: Mapping[str, Any], done: Done) -> None:
        """Have an entry written; never waits."""
        if self._queue.qsize() < _MAX_PENDING:
            self._queue.put((entry, done))
        else:
            self._dropped += 1
            done(OSError("the disk does not take the lines"))

    def close(self) -> None:
        """Write the pending entries, but don't wait long for a disk that hangs."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            taken = [self._queue.get()]
            with suppress(Empty):
                while taken[-1] is not None and len(taken) < _BATCH:
                    taken.append(self._queue.get_nowait())
            is_open = taken[-1] is not None
            if batch := [each for each in taken if each is not None]:
                self._write_batch(batch)

    def _write_batch(self, batch: Sequence[_Pending]) -> None:
        error: OSError | None = None
        try:
            self._append([entry for entry, _ in batch])
        except OSError as exc:
            error = exc
            self._unwritten += len(batch)
        # Once, so that a disk that stays full doesn't fill the log, too.
        if self._fails != (error is not None):
            self._fails = error is not None
            can = "can be written again"
            if error is not None:
                can = f"can't be written: {error.strerror or error}"
            logger.error("the audit log %s %s", self._path, can)
        for _, done in batch:
            done(error)

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        lost = self._dropped + self._unwritten - self._told
        with self._locked() as copy:
            kept = os.pread(copy, MAX_LINE_BYTES, 0)
            end = self._end()
            links = (self._last, read_line(self._key, kept), end.last)
            before = max(each for each in links if each)
            has_none = end.last is None and end.size > 0
            if has_none or end.size >= self._max_bytes:
                self._rotate()
            notes: list[dict[str, Any]] = []
            if before is BEGINNING and (has_none or kept):
                notes.append({"act": "new_chain", "why": "before, no line has a seal of this key"})
            elif not kept and before is not BEGINNING:
                notes.append({"act": "lost_copy", "why": "the copy of the last line was missing"})
            if end.cut_bytes:
                notes.append({"act": "cut_line", "count": end.cut_bytes})
            if lost:
                notes.append({"act": "lost_lines", "count": lost})
            lines = []
            for entry in [*({"time": entries[0]["time"]} | note for note in notes), *entries]:
                line, before = sealed(self._key, entry, before)
                lines.append(line)
            self._write(b"".join(lines))
            self._last, self._told = before, self._told + lost
            # Without it the chain goes on behind the log's last line.
            with suppress(OSError):
                os.pwrite(copy, lines[-1], 0)
                os.ftruncate(copy, len(lines[-1]))

    def _write(self, data: bytes) -> None:
        file = self._open()
        try:
            size = os.fstat(file).st_size
            try:
                if os.write(file, data) < len(data):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
                os.fsync(file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of the log; gives the file with the copy of the last line."""
        path = copy_of_last(self._path)
        while True:
            copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(copy, fcntl.LOCK_EX)
                # Somebody may have removed it while we waited.
                if is_at(path, copy):
                    yield copy
                    return
            finally:
                os.close(copy)

    def _end(self) -> "_End":
        """Look at the end of the log, and remove a line there that was cut."""
        file = self._open()
        try:
            size = os.fstat(file).st_size
            start = max(0, size - 2 * MAX_LINE_BYTES)
            data = os.pread(file, size - start, start)
            whole = data.rfind(b"\n") + 1
            if cut := len(data) - whole:
                os.ftruncate(file, size - cut)
        finally:
            os.close(file)
        lines = reversed(data[:whole].splitlines(keepends=True))
        links = (read_line(self._key, line) for line in lines)
        return _End(size - cut, next((link for link in links if link), None), cut)

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            newer = rotated(self._path, number - 1) if number > 1 else self._path
            with suppress(FileNotFoundError):
                newer.replace(rotated(self._path, number))

    def _open(self) -> int:
        """Return the log, which is made if it is missing, and whose name is on disk then."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        file = os.open(self._path, flags, 0o600)
        try:
            if os.fstat(file).st_size == 0:
                folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError:
            os.close(file)
            raise
        return file


class _End(NamedTuple):
    size: int
    last: ChainLink | None
    """Of its last line that was sealed with our key."""
    cut_bytes: int


def rotated(path: Path, number: int) -> Path:
    """Return the name of an older file: `x.2.jsonl` for the second before `x.jsonl`."""
    return path.with_suffix(f".{number}{path.suffix}")


def copy_of_last(path: Path) -> Path:
    """Return the name of the file that keeps a copy of a log's last line."""
    return path.with_name(f"{path.name}.last")
