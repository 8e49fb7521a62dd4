"""Files that all workers write: each line whole, none lost, and one who rotates."""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import orjson
import pytest

from server.telemetry.trace_log import rotated
from tests.waiting import HANGS_S

WRITERS, LINE_BYTES = 3, 90
LINES = 12_000
"""Of each trace: enough that all write at once, and fewer than wait to be written."""

LOGGER = """
import sys
from server.telemetry.logs import LogStream

writer = sys.argv[1]
stream = LogStream(sys.stderr.buffer, max_bytes=1 << 30)
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    # As a batch of the access log; a path may be longer than what a pipe takes in one step.
    lines = [f"{writer} {number} {each} {writer * (number * each % 9000)}." for each in range(16)]
    stream.write("".join(f"{line}\\n" for line in lines))
stream._queue.put(None)
stream._thread.join()
"""


def start(program: str, *arguments: object, **streams: object) -> list[subprocess.Popen]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, **streams,
        )
        for number in range(WRITERS)
    ]  # fmt: skip


def finish(writers: list[subprocess.Popen]) -> list[bytes]:
    """Let all begin at once, and wait for their end; returns what they print."""
    assert [each.stdout.readline() for each in writers] == [b"ready\n"] * WRITERS
    for each in writers:
        each.stdin.write(b"go\n")
        each.stdin.flush()
    printed = [each.communicate(timeout=HANGS_S)[0] for each in writers]
    assert [each.returncode for each in writers] == [0] * WRITERS
    return printed


def read_all(read: Callable[[int], bytes], into: bytearray) -> None:
    while data := read(1 << 16):
        into += data


def finish_into_stream(kind: str) -> bytes:
    """Return what the loggers write to a pipe or a socket."""
    if kind == "pipe":
        readable, writable = (os.fdopen(fd, "r+b", buffering=0) for fd in os.pipe())
        # It is full soon, so that long writes have to wait within their lines.
        fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, 4096)
        read: Callable[[int], bytes] = readable.read
    else:
        readable, writable = socket.socketpair()
        read = readable.recv
    got = bytearray()
    reader = Thread(target=read_all, args=(read, got))
    with readable:
        with writable:
            writers = start(LOGGER, stderr=writable)
        reader.start()
        finish(writers)
        reader.join()
    return bytes(got)


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_log_lines_of_several_processes_stay_whole(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        with (tmp_path / "log").open("wb") as target:
            finish(start(LOGGER, stderr=target))
        got = (tmp_path / "log").read_bytes()
    else:
        got = finish_into_stream(kind)
    lines = sorted(got.decode().splitlines())
    expected = [
        f"{writer} {number} {each} {str(writer) * (number * each % 9000)}."
        for writer in range(WRITERS)
        for number in range(60)
        for each in range(16)
    ]
    assert lines == sorted(expected)


TRACER = """
import sys
import time
from pathlib import Path
from server.telemetry.trace_log import TraceLog
from tiers import Answer

writer, path, max_bytes, lines = int(sys.argv[1]), *sys.argv[2:]
trace = TraceLog(Path(path), int(max_bytes))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(lines)):
    trace.add(1e9, f"{writer}-{number}", "m", Answer(0, b"{}"), ("memory", "hit"))
trace._closing.set()
trace._thread.join()
print(trace.missing, flush=True)
"""


def keys_in(path: Path) -> list[str]:
    return [orjson.loads(line)["key"] for line in path.read_bytes().splitlines()]


def expected_keys() -> list[str]:
    return sorted(f"{writer}-{number}" for writer in range(WRITERS) for number in range(LINES))


def test_one_of_several_processes_rotates_and_no_line_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    # All lines fit into two files, so they are all there if one of the processes rotates once.
    most = int(0.6 * WRITERS * LINES * LINE_BYTES)
    assert finish(start(TRACER, file, most, LINES)) == [b"0\n"] * WRITERS
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "t.1.jsonl"}
    assert file.stat().st_size <= most
    assert 0.9 * most < rotated(file).stat().st_size <= most
    assert sorted(keys_in(rotated(file)) + keys_in(file)) == expected_keys()


def test_files_that_fill_quickly_never_grow_beyond_their_bound(tmp_path: Path) -> None:
    file, most = tmp_path / "t.jsonl", 40_000
    assert finish(start(TRACER, file, most, LINES)) == [b"0\n"] * WRITERS
    assert file.stat().st_size <= most
    assert 0.75 * most < rotated(file).stat().st_size <= most
    kept = keys_in(rotated(file)) + keys_in(file)
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(expected_keys())
