"""The trace: a log of requests that `tierserve simulate` replays.

JSON lines, one for each request that a tier answered or could have answered: `time` (of the answer,
Unix s), `key`, `size` (bytes of the answer), `tokens` (of output, if the answer has the count),
`model`, `tier` and `outcome`. Keys are digests; prompts and answers aren't written.

Each prompt that an engine answered has a line of its own, whether the answer may be kept (`outcome`
is `generated`, and `key` that of the request) or not (`bypass`). It has `blocks`
(`server.telemetry.prompt_blocks`), `characters` of the prompt's text, `tokens`, and
`prompt_tokens`, if the answer has the count. A hit computes nothing: it repeats a key, and so the
prompt of that key.
"""

import fcntl
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from secrets import token_bytes
from typing import NamedTuple

import orjson

from server.config.base import ConfigError
from server.protocol.request import ParsedRequest
from server.protocol.usage import counts_in, input_tokens_in, output_tokens_in
from server.telemetry.logs import is_at
from server.telemetry.prompt_blocks import load_key, prompt_blocks
from tiers import Answer

logger = logging.getLogger(__name__)

_FLUSH_S = 0.2
# Far more requests than are answered between two flushes.
_MAX_PENDING = 16 * 1024
_MAX_PENDING_BYTES = 64 * 1024**2
"""Of the bodies of pending prompts."""
# Few, so that the thread lets the event loop run after a fraction of a millisecond.
_BATCH = 32
_PAUSE_S = 0.0005
_CLOSE_S = 5
_MODEL_CHARACTERS = 256
# The longest line.
_LINE_BYTES = 16 * 1024


# Time, key, size, token counts, model, tier and outcome: a plain tuple, since it costs least.
_Line = tuple[float, str, int, bytes, str, tuple[str, str]]


class _Prompt(NamedTuple):
    at: float
    request: ParsedRequest
    counts: bytes
    bypassed: bool


class TraceLog:
    """A trace, written in batches by a thread, which also computes the blocks of prompts.

    Requests that don't fit into the queue, or can't be written, are missing from the trace; the log
    has their number. At `max_bytes` the file is renamed to `rotated(path)`, in place of an older
    one, and a new file begins. A new one also begins after somebody else has renamed the file.
    Several processes may write one trace: the one that writes has a lock of the file (flock(2)),
    which the kernel frees when it dies, and renames the file or finds out that another has.

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
        except OSError as exc:
            should = f"should be a file that we can write, not {path}: {exc.strerror or exc}"
            raise ConfigError([f"log.trace: {should}"]) from exc
        self._pending: deque[_Line | _Prompt] = deque()
        # Bytes of all prompts that came, and of those that were written; each has one writer.
        self._came_bytes = self._done_bytes = 0
        self._key: bytes | None = None
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

    def add_prompt(
        self, at: float, request: ParsedRequest, counts: bytes, *, bypassed: bool
    ) -> None:
        """Add a prompt that an engine answered at `at` (Unix s); never waits and never fails.

        Args:
            at: Unix seconds.
            request: what was asked; several prompts in one request have no common token count,
                and are left out.
            counts: the end of the answer, which may have the token counts.
            bypassed: whether the answer may not be kept.
        """
        if not request.route.streams or request.prompts.number > 1:
            return
        came_bytes = self._came_bytes + len(request.raw)
        is_full = came_bytes - self._done_bytes > _MAX_PENDING_BYTES
        if is_full or len(self._pending) >= _MAX_PENDING:
            self._dropped += 1
            return
        self._came_bytes = came_bytes
        self._pending.append(_Prompt(at, request, counts, bypassed))

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
        with suppress(OSError), self._locked_file(0):
            # If somebody has renamed the file, it is there again.
            pass
        while self._pending:
            lines = self._next_lines()
            try:
                self._write(b"".join(lines))
            except OSError as exc:
                self._unwritten += len(lines)
                reason = str(exc)
            self._closing.wait(_PAUSE_S)
        # At each doubling, so that a disk that stays full doesn't fill the log, too.
        if self.missing > 2 * self._logged:
            self._logged = self.missing
            logger.error("%d requests are missing from the trace: %s", self._logged, reason)

    def _next_lines(self) -> list[bytes]:
        lines: list[bytes] = []
        while self._pending and len(lines) < _BATCH:
            line = self._pending.popleft()
            if isinstance(line, _Prompt):
                # It may take as long as all other lines of a batch.
                lines.append(self._prompt_line(line))
                self._done_bytes += len(line.request.raw)
                break
            lines.append(_json_line(line))
        return lines

    def _prompt_line(self, prompt: _Prompt) -> bytes:
        at, request, counts, bypassed = prompt
        if self._key is None:
            self._key = _key_beside(self._path)
        digests, characters = prompt_blocks(request, self._key)
        fields: dict[str, object] = {"time": round(at, 3), "model": _name(request.model)}
        fields |= (
            {"outcome": "bypass"} if bypassed else {"outcome": "generated", "key": request.key}
        )
        numbers = {
            "tokens": output_tokens_in(counts),
            "prompt_tokens": input_tokens_in(counts),
            "characters": characters,
        }
        fields |= {name: number for name, number in numbers.items() if number is not None}
        return orjson.dumps(fields | {"blocks": digests}) + b"\n"

    def _write(self, data: bytes) -> None:
        with self._locked_file(len(data)) as size:
            written = os.write(self._file, data)
            if written < len(data):
                os.ftruncate(self._file, size)
                raise OSError(ENOSPC, "no room for all of it")

    @contextmanager
    def _locked_file(self, more_bytes: int) -> Iterator[int]:
        """Hold the lock of the file that has the name now and room for more; gives its size."""
        try:
            while True:
                fcntl.flock(self._file, fcntl.LOCK_EX)
                size = os.fstat(self._file).st_size
                if not is_at(self._path, self._file):
                    before, self._file = self._file, _open(self._path)
                    os.close(before)
                elif size and size + more_bytes > self._max_bytes:
                    # Where somebody has removed the file, there is room as well.
                    with suppress(FileNotFoundError):
                        self._path.replace(rotated(self._path))
                else:
                    break
            yield size
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def rotated(path: Path) -> Path:
    """Return the name that a full trace takes: `trace.1.jsonl` for `trace.jsonl`."""
    return path.with_suffix(f".1{path.suffix}")


def _open(path: Path) -> int:
    """Open a trace, which is made if it is missing, and cut a partial line off its end."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # Nobody writes meanwhile.
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        start = max(0, size - _LINE_BYTES)
        whole = start + os.pread(file, _LINE_BYTES, start).rfind(b"\n") + 1
        if whole < size:
            os.ftruncate(file, whole)
        fcntl.flock(file, fcntl.LOCK_UN)
    except OSError:
        os.close(file)
        raise
    return file


def _key_beside(path: Path) -> bytes:
    """Return the key of a trace's blocks."""
    file = path.with_suffix(".key")
    try:
        return load_key(file)
    except OSError as exc:
        logger.error(
            "the key of the trace's blocks can't be kept in %s, so they have another one after a "
            "restart: %s", file, exc,
        )  # fmt: skip
        return token_bytes(32)


def _json_line(line: _Line) -> bytes:
    at, key, size, counts, model, (tier, outcome) = line
    fields = {"time": round(at, 3), "key": key, "size": size}
    if (tokens := output_tokens_in(counts)) is not None:
        fields["tokens"] = tokens
    rest = {"model": _name(model), "tier": tier, "outcome": outcome}
    return orjson.dumps(fields | rest) + b"\n"


def _name(model: str) -> str:
    # A name may hold lone surrogates, which orjson does not write.
    return model[:_MODEL_CHARACTERS].encode(errors="backslashreplace").decode()
