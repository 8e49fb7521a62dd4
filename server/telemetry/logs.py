"""Logs on standard error: text on a terminal, JSON lines elsewhere.

Where standard error is a file that is renamed, as by logrotate, logs continue in a new file of the
old name.
"""

import fcntl
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from server.config.schema import LogConfig

Access = tuple[float, str, str, int, str, str, str, float, tuple[str, str] | None]
"""A request's time (Unix s), method, path, status, id, tier, outcome, seconds, and which model was
asked for and which has answered, if they differ: a plain tuple, since a named one would cost each
hit half a microsecond more."""

# The kernel appends as much to a file or a Unix socket in one step, but to a pipe only one page.
_PIECE_BYTES = 32 * 1024
_CLOSE_S = 2


class LogStream:
    """Standard error, written by a thread, so that a reader that stalls blocks nobody.

    Writes beyond `max_bytes` of queued text are dropped; a later line has their number. Several
    processes may share it: lines stay whole, in a pipe of any length.
    The standard library's `QueueListener` bounds records instead of bytes, and takes no access log
    that is formatted in batches without `logging`.
    """

    def __init__(self, target: BinaryIO, max_bytes: int = 8 * 1024**2) -> None:
        self._target, self._max_bytes = target, max_bytes
        self._path = _file_path(target)
        self._pipe = _pipe_lock(target)
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._queued_bytes = self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str | bytes) -> None:
        """Queue text; never waits and never fails."""
        data = text if isinstance(text, bytes) else text.encode(errors="backslashreplace")
        with self._lock:
            if self._queued_bytes + len(data) > self._max_bytes:
                self._dropped += 1
                return
            data = self._drop_notice() + data
            self._queued_bytes += len(data)
        self._queue.put(data)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def close(self) -> None:
        """Write what is queued, but don't wait long for a reader that stalls."""
        with self._lock:
            data = self._drop_notice()
            self._queued_bytes += len(data)
        self._queue.put(data)
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _drop_notice(self) -> bytes:
        """Return the line that has the count of dropped writes, if there were any; resets it."""
        dropped, self._dropped = self._dropped, 0
        return b"%d log writes were dropped\n" % dropped if dropped else b""

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            with suppress(OSError, ValueError):
                self._reopen_if_moved()
                self._write_whole_lines(data)
            with self._lock:
                self._queued_bytes -= len(data)
        if self._pipe is not None:
            os.close(self._pipe)

    def _write_whole_lines(self, data: bytes) -> None:
        """Write data so that no other process writes within its lines."""
        begin = 0
        if self._pipe is not None:
            fcntl.flock(self._pipe, fcntl.LOCK_EX)
        try:
            while begin < len(data):
                end = data.rfind(b"\n", begin, begin + _PIECE_BYTES) + 1
                end = end or data.find(b"\n", begin) + 1 or len(data)
                self._target.write(data[begin:end])
                self._target.flush()
                begin = end
        finally:
            if self._pipe is not None:
                fcntl.flock(self._pipe, fcntl.LOCK_UN)

    def _reopen_if_moved(self) -> None:
        # If the path can't be opened, such as in a removed folder, the open file stays.
        with suppress(OSError):
            if self._path is None or is_at(self._path, file := self._target.fileno()):
                return
            mode = stat.S_IMODE(os.fstat(file).st_mode)
            new = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, mode)
            # Whatever else writes to standard error writes there, too.
            os.dup2(new, file)
            os.close(new)


def is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _pipe_lock(target: BinaryIO) -> int | None:
    """Return a file whose lock (flock(2)) is that of a pipe; `None` if it is no pipe of ours."""
    try:
        file = target.fileno()
        if not stat.S_ISFIFO(os.fstat(file).st_mode):
            return None
        # Opened anew, since locks belong to open files, which processes inherit. A pipe that has no
        # reader any more must not be waited for.
        return os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None


def _file_path(target: BinaryIO) -> Path | None:
    """Return the path of a stream's file; `None` if it is no file."""
    try:
        path = Path(f"/proc/self/fd/{target.fileno()}").readlink()
        return path if path.is_file() and is_at(path, target.fileno()) else None
    except (OSError, ValueError):
        return None


def configure(log: LogConfig) -> LogStream:
    """Set up logging for the process; returns its stream, which the caller closes."""
    stream = LogStream(sys.stderr.buffer)
    handler = logging.StreamHandler(stream)
    if _is_json(log):
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(OrjsonFormatter(fields))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)
    return stream


class AccessLog:
    """One line for each answered request, in the stream and the format of the logs.

    Lines are formatted and written in batches, without `logging`, which would cost more than a hit.
    """

    def __init__(self, log: LogConfig, stream: LogStream) -> None:
        self._stream = stream
        self.enabled = logging.getLogger().isEnabledFor(logging.INFO)
        self._line = _json_line if _is_json(log) else _text_line

    def set_level(self, level: str) -> None:
        """Log from this level on in this process, requests as `info`."""
        logging.getLogger().setLevel(level.upper())
        self.enabled = logging.getLogger().isEnabledFor(logging.INFO)

    def write(self, requests: Iterable[Access]) -> None:
        """Write the lines of requests."""
        self._stream.write("".join(map(self._line, requests)))


def _json_line(access: Access) -> str:
    at, method, path, status, request_id, tier, outcome, seconds, models = access
    # The other fields are ours, and need no escaping.
    message = _message(method, path, status)
    fallback = "" if models is None else ',"model":{},"fallback":{}'.format(*map(_quoted, models))
    return (
        f'{{"asctime":"{_stamp(at)}","levelname":"INFO","name":"tierserve.access",'
        f'"message":{message},"request_id":"{request_id}","tier":"{tier}","outcome":"{outcome}",'
        f'"ms":{seconds * 1000:.3f}{fallback}}}\n'
    )


def _quoted(text: str) -> str:
    return orjson.dumps(text).decode()


@lru_cache(256)
def _message(method: str, path: str, status: int) -> str:
    # A path may hold any character, lone surrogates included.
    text = f"{method} {path} {status}".encode(errors="backslashreplace").decode()
    return _quoted(text)


def _text_line(access: Access) -> str:
    at, method, path, status, request_id, tier, outcome, seconds, models = access
    fallback = "" if models is None else f" fallback {models[0]} -> {models[1]}"
    # A path may hold any character, line ends included.
    return (
        f"{_stamp(at)} INFO    tierserve.access: {method} {path!a} {status} {tier} {outcome}"
        f" {seconds * 1000:.3f} ms {request_id}{fallback}\n"
    )


def _stamp(at: float) -> str:
    return f"{_second(int(at))},{int(at % 1 * 1000):03d}"


@lru_cache(2)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _is_json(log: LogConfig) -> bool:
    return log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
