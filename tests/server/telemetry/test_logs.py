"""Logs: that nobody waits for their reader, and that nothing can pass for a line of ours."""

import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import server.telemetry.logs
from server.config.schema import LogConfig
from server.telemetry.logs import AccessLog, LogStream, configure
from tests.waiting import HANGS_S


def access(
    path: str = "/v1/models", request_id: str = "id-7", models: tuple[str, str] | None = None
) -> tuple:
    return (1e9, "GET", path, 200, request_id, "memory", "hit", 0.0012345, models)


class Stalling(io.RawIOBase):
    """Takes nothing until it may; sets an event when a write waits for it."""

    def __init__(self) -> None:
        self.written = b""
        self.go_on, self.waited_for = threading.Event(), threading.Event()

    def write(self, data: bytes) -> int:
        self.waited_for.set()
        self.go_on.wait()
        self.written += data
        return len(data)


@pytest.fixture
def stalling() -> Iterator[Stalling]:
    made = Stalling()
    yield made
    made.go_on.set()


@pytest.fixture
def root(monkeypatch) -> Iterator[None]:
    """Put the root logger aside."""
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    yield
    logging.root.setLevel(level)


def test_what_is_written_is_read() -> None:
    target = io.BytesIO()
    stream = LogStream(target)
    stream.write("one\n")
    stream.write(b"two \xff\n")
    stream.write("no text: \udcff\n")
    stream.close()
    assert target.getvalue() == b"one\ntwo \xff\nno text: \\udcff\n"


def test_a_reader_that_is_gone_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb", buffering=0) as target:  # noqa: PTH123
        stream = LogStream(target)
        for _ in range(3):
            stream.write("x\n")
        stream.close()
    assert not stream._thread.is_alive()
    assert stream._queued_bytes == 0


def test_a_target_that_was_closed_is_no_failure() -> None:
    target = io.BytesIO()
    target.close()
    stream = LogStream(target)
    stream.write("x\n")
    stream.close()
    assert not stream._thread.is_alive()


def test_a_reader_that_stalls_costs_lines_and_nothing_else(stalling: Stalling) -> None:
    stream = LogStream(stalling, max_bytes=10)
    stream.write(b"12345678\n")
    assert stalling.waited_for.wait(HANGS_S)
    for _ in range(3):
        stream.write(b"dropped\n")
    # What fits is still taken, with the number of what didn't.
    stream.write(b"\n")
    stream.write(b"dropped\n")
    stalling.go_on.set()
    stream.close()
    assert stalling.written == b"12345678\n3 log writes were dropped\n\n1 log writes were dropped\n"


def test_closing_does_not_wait_for_a_reader_that_stalls(stalling: Stalling, monkeypatch) -> None:
    monkeypatch.setattr(server.telemetry.logs, "_CLOSE_S", 0)
    stream = LogStream(stalling)
    stream.write("x\n")
    assert stalling.waited_for.wait(HANGS_S)
    stream.close()
    assert stalling.written == b""


@pytest.mark.parametrize(
    ("form", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("text", False, False), ("json", True, True)],
)
@pytest.mark.usefixtures("root")
def test_lines_have_the_form_that_is_configured(
    monkeypatch, form: str, terminal: bool, is_json: bool
) -> None:
    target = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(buffer=target, isatty=lambda: terminal))
    log = LogConfig(format=form, level="warning")
    stream = configure(log)
    logging.getLogger("a.b").info("not said")
    logging.getLogger("a.b").warning("two\nlines %d", 7, extra={"request_id": "id-7"})
    stream.close()
    if is_json:
        record = json.loads(target.getvalue())
        assert re.fullmatch(r"[\d-]+ [\d:]+,\d{3}", record.pop("asctime"))
        assert record == {
            "levelname": "WARNING", "name": "a.b", "message": "two\nlines 7", "request_id": "id-7"
        }  # fmt: skip
    else:
        pattern = rb"[\d-]+ [\d:]+,\d{3} WARNING a\.b: two\nlines 7\n"
        assert re.fullmatch(pattern, target.getvalue())


async def access_lines(form: str, *accesses: tuple, level: str = "info") -> list[str]:
    target = io.BytesIO()
    stream = LogStream(target)
    logging.root.setLevel(level.upper())
    log = AccessLog(LogConfig(format=form), stream)
    if log.enabled:
        log.write(accesses)
    stream.close()
    *lines, empty = target.getvalue().decode().split("\n")
    assert empty == ""
    return lines


@pytest.mark.usefixtures("root")
async def test_an_access_says_who_asked_for_what_and_what_came_of_it() -> None:
    (line,) = await access_lines("json", access())
    record = json.loads(line)
    stamp = record.pop("asctime")
    assert record == {
        "levelname": "INFO", "name": "tierserve.access", "message": "GET /v1/models 200",
        "request_id": "id-7", "tier": "memory", "outcome": "hit", "ms": 1.234,
    }  # fmt: skip
    (line,) = await access_lines("text", access())
    expected = " INFO    tierserve.access: GET '/v1/models' 200 memory hit 1.234 ms id-7"
    assert line == stamp + expected
    (line,) = await access_lines("json", access(models=('m "', "n")))
    assert json.loads(line) == record | {"asctime": stamp, "model": 'm "', "fallback": "n"}
    (line,) = await access_lines("text", access(models=("m", "n")))
    assert line == stamp + expected + " fallback m -> n"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("form", ["json", "text"])
async def test_a_path_can_not_forge_a_line(form: str) -> None:
    forged = "/\n2026-01-01 INFO forged\r\x1b[2K\x85\u2028\ud800'\""
    (line,) = await access_lines(form, access(path=forged))
    assert line.isprintable() or form == "json"
    assert not re.search(r"[\x00-\x1f]", line)
    if form == "json":
        assert json.loads(line)["message"].startswith("GET /\n2026-01-01 INFO forged\r\x1b[2K")


@pytest.mark.usefixtures("root")
async def test_accesses_are_written_in_batches_and_in_order() -> None:
    accesses = [access(request_id=str(number)) for number in range(600)]
    lines = await access_lines("json", *accesses)
    assert [json.loads(line)["request_id"] for line in lines] == [str(n) for n in range(600)]
    assert await access_lines("json", access(), level="warning") == []
