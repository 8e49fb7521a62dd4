"""The trace: a log of requests that `tierserve simulate` replays.

JSON lines, one for each request that a tier answered or could have answered: `time` (of the answer,
Unix s), `key`, `size` (bytes of the answer), `tokens` (of output, if the answer has the count),
`model`, `tier` and `outcome`. Keys are digests; prompts and answers aren't written.
"""

import logging
import os
import threading
from collections import deque
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path

import orjson

from server.config.base import ConfigError
from server.protocol.usage import counts_in, output_tokens_in
from server.telemetry.logs import is_at
from tiers import Answer

logger = logging.getLogger(__name__)

_FLUSH_S = 0.2
# Far more requests than are answered between two flushes.
_MAX_PENDING = 16 * 1024
# Few, so that the thread lets the event loop run after a fraction of a millisecond.
_BATCH = 32
_PAUSE_S = 0.0005
_CLOSE_S = 5
_MODEL_CHARACTERS = 256
# The longest line.
_LINE_BYTES = 4096


# Time, key, size, token counts, model, tier and outcome: a plain tuple, since it costs least.
_Line = tuple[float, str, int, bytes, str, tuple[str, str]]


class TraceLog:
    """A trace, written in batches by a thread.

    Requests that don't fit into the queue, or can't be written, are missing from the trace; the log
    has their number. At `max_bytes` the file is renamed to `rotated(path)`, in place of an older
    one, and a new file begins. A new one also begins after somebody else has renamed the file.

    Args:
        path: of the trace; an existing file is continued.
        max_bytes: of each of the two files.

    Raises:
        ConfigError: the file can't be written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        try:
            self._file = _open(path)
            self._bytes = _truncate_partial_line(self._file)
        except OSError as exc:
            should = f"should be a file that we can write, not {path}: {exc.strerror or exc}"
            raise ConfigError([f"log.trace: {should}"]) from exc
        self._pending: deque[_Line] = deque()
        self._dropped = self._unwritten = self._logged = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    @property
    def missing(self) -> int:
        """The number of requests that are missing from the trace."""
        return self._dropped + self._unwritten

    def add(
        self, at: float, key: str, model: str, answer: Answer, outcome: tuple[str, str]
    ) -> None:
        """Add a request that was answered at `at` (Unix s); never waits and never fails."""
        if len(self._pending) >= _MAX_PENDING:
            self._dropped += 1
            return
        size = len(answer.content) + len(answer.trailer)
        # The whole answer would keep its memory while it is pending.
        counts = counts_in(answer)
        self._pending.append((at, key, size, counts, model[:_MODEL_CHARACTERS], outcome))

    def close(self) -> None:
        """Write the pending requests, but don't wait long for a disk that hangs."""
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while not self._closing.wait(_FLUSH_S):
            self._write_pending()
        self._write_pending()
        os.close(self._file)

    def _write_pending(self) -> None:
        reason = "they come faster than the disk takes them"
        with suppress(OSError):
            # Somebody may have renamed the file, or truncated it.
            if is_at(self._path, self._file):
                self._bytes = os.fstat(self._file).st_size
            else:
                self._begin()
        while self._pending:
            lines = [self._pending.popleft() for _ in range(min(_BATCH, len(self._pending)))]
            try:
                self._write(b"".join(map(_json_line, lines)))
            except OSError as exc:
                self._unwritten += len(lines)
                reason = str(exc)
            self._closing.wait(_PAUSE_S)
        # At each doubling, so that a disk that stays full doesn't fill the log, too.
        if self.missing > 2 * self._logged:
            self._logged = self.missing
            logger.error("%d requests are missing from the trace: %s", self._logged, reason)

    def _write(self, data: bytes) -> None:
        if self._bytes + len(data) > self._max_bytes:
            # Where somebody has removed the file, there is room as well.
            with suppress(FileNotFoundError):
                self._path.replace(rotated(self._path))
            self._begin()
        written = os.write(self._file, data)
        if written < len(data):
            os.ftruncate(self._file, self._bytes)
            raise OSError(ENOSPC, "no room for all of it")
        self._bytes += written

    def _begin(self) -> None:
        """Continue in the file that has the name now, which is created if it is missing."""
        before, self._file = self._file, _open(self._path)
        os.close(before)
        self._bytes = _truncate_partial_line(self._file)


def rotated(path: Path) -> Path:
    """Return the name that a full trace takes: `trace.1.jsonl` for `trace.jsonl`."""
    return path.with_suffix(f".1{path.suffix}")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _truncate_partial_line(file: int) -> int:
    """Truncate a partial line at the end of a file; return the bytes that remain."""
    size = os.fstat(file).st_size
    start = max(0, size - _LINE_BYTES)
    whole = start + os.pread(file, _LINE_BYTES, start).rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(file, whole)
    return whole


def _json_line(line: _Line) -> bytes:
    at, key, size, counts, model, (tier, outcome) = line
    fields = {"time": round(at, 3), "key": key, "size": size}
    if (tokens := output_tokens_in(counts)) is not None:
        fields["tokens"] = tokens
    # A name may hold lone surrogates, which orjson does not write.
    name = model.encode(errors="backslashreplace").decode()
    return orjson.dumps(fields | {"model": name, "tier": tier, "outcome": outcome}) + b"\n"
