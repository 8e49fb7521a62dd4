"""Logs on standard error: text on a terminal, JSON lines elsewhere."""

import asyncio
import logging
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from queue import SimpleQueue
from typing import BinaryIO

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from server.config import Log

# A plain tuple: making anything more of it would cost each hit half a microsecond.
_Access = tuple[float, str, str, int, str, str, str, float]

_FLUSH_S = 0.2
_BATCH = 256
_CLOSE_S = 2


class LogStream:
    """Standard error, written by a thread: a reader that stalls or goes stops nobody.

    What doesn't fit into the queue is dropped, and how much that was is said later.
    """

    def __init__(self, target: BinaryIO, max_bytes: int = 8 * 1024**2) -> None:
        self._target, self._max_bytes = target, max_bytes
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
            data = self._drops() + data
            self._queued_bytes += len(data)
        self._queue.put(data)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def close(self) -> None:
        """Write what is queued, but don't wait long for a reader that stalls."""
        with self._lock:
            data = self._drops()
            self._queued_bytes += len(data)
        self._queue.put(data)
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _drops(self) -> bytes:
        """Return the line that says what was dropped, if anything was; it is said once."""
        dropped, self._dropped = self._dropped, 0
        return b"%d log writes were dropped\n" % dropped if dropped else b""

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            with suppress(OSError, ValueError):
                self._target.write(data)
                self._target.flush()
            with self._lock:
                self._queued_bytes -= len(data)


def configure(log: Log) -> LogStream:
    """Set up logging for the whole process; returns the stream, to be closed at the end."""
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
    """One line for each answered request, among the logs and in their format.

    Lines are made and written in batches, without `logging`, which would cost more than a hit.
    """

    def __init__(self, log: Log, stream: LogStream) -> None:
        self._stream = stream
        self._enabled = logging.getLogger().isEnabledFor(logging.INFO)
        self._line = _json_line if _is_json(log) else _text_line
        self._waiting: list[_Access] = []

    def add(self, *access: *_Access) -> None:
        """Note a request; its line is written within a fraction of a second.

        Takes when it ended (Unix s), method, path, status, request id, tier, outcome, and seconds.
        """
        if not self._enabled:
            return
        if not self._waiting:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        self._waiting.append(access)
        if len(self._waiting) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        if self._waiting:
            lines = "".join(map(self._line, self._waiting))
            self._waiting.clear()
            self._stream.write(lines)


def _json_line(access: _Access) -> str:
    at, method, path, status, request_id, tier, outcome, seconds = access
    # All else is ours, and needs no quoting.
    message = _message(method, path, status)
    return (
        f'{{"asctime":"{_stamp(at)}","levelname":"INFO","name":"tierserve.access",'
        f'"message":{message},"request_id":"{request_id}","tier":"{tier}","outcome":"{outcome}",'
        f'"ms":{seconds * 1000:.3f}}}\n'
    )


@lru_cache(256)
def _message(method: str, path: str, status: int) -> str:
    # A path may hold any character, halves of surrogate pairs included.
    text = f"{method} {path} {status}".encode(errors="backslashreplace").decode()
    return orjson.dumps(text).decode()


def _text_line(access: _Access) -> str:
    at, method, path, status, request_id, tier, outcome, seconds = access
    # A path may hold any character, those that end a line included.
    return (
        f"{_stamp(at)} INFO    tierserve.access: {method} {path!a} {status} {tier} {outcome}"
        f" {seconds * 1000:.3f} ms {request_id}\n"
    )


def _stamp(at: float) -> str:
    return f"{_second(int(at))},{int(at % 1 * 1000):03d}"


@lru_cache(2)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _is_json(log: Log) -> bool:
    return log.format == "json" or (log.format == "auto" and not sys.stderr.isatty())
