"""The trace of our own requests: simulations find in it what the server did, and no secrets."""

import asyncio
import logging
import os
import random
import shutil
import subprocess
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from server.config.base import ConfigError
from server.protocol.formats import Encoding
from server.simulation.traces import TraceRequest, read
from server.telemetry.trace_log import TraceLog, rotated
from tests.server.conftest import Front, Upstream, alike, body, running
from tests.waiting import HANGS_S
from tiers import Answer

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER = Answer(Encoding.JSON, b'{"choices":[],"usage":{"completion_tokens":7}}', b"")


def add(trace: TraceLog, number: int, answer: Answer = ANSWER, model: str = "m") -> None:
    trace.add(1e9 + number, f"key{number}", model, answer, ("memory", "hit"))


async def test_a_simulation_of_the_trace_finds_what_the_server_found(
    upstream: Upstream, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "trace.jsonl"
    monkeypatch.setenv("TIERSERVE__LOG__TRACE", "trace.jsonl")
    monkeypatch.setenv("TIERSERVE__TIERS__MEMORY__MAX_BYTES", "65536")

    async def long(http: web.Request) -> web.StreamResponse:
        asked = orjson.loads(await http.read())
        return web.json_response(body("long " * 1000 + asked["messages"][0]["content"]))

    upstream.handler = long
    chance = random.Random(1)
    async with running(tmp_path, upstream) as front:
        seen = set()
        for number in (int(chance.paretovariate(0.5)) % 40 for _ in range(200)):
            seen.add(number)
            await _ask(front, number, len(seen))
        hits = [await front.metric(_hits(tier)) for tier in ("memory", "disk")]
    trace = read(file)
    assert len(trace.requests) == 200
    assert len(trace.sizes) == len(seen)
    assert {request.tokens for request in trace.requests} == {1}
    assert "long" not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    command = [*front.command[:3], "simulate", str(file), *front.command[-2:], "--json"]
    simulated = subprocess.run(command, capture_output=True, check=True)
    (report,) = orjson.loads(simulated.stdout)["traces"]
    assert [tier["hits"] for tier in report["chain"]["tiers"]] == hits
    assert min(hits) > 10


async def _ask(front: Front, number: int, answers: int) -> None:
    """Ask a question, and wait until so many answers are stored."""
    messages = [{"role": "user", "content": f"question {number}"}]
    status, _, _ = await front.ask({"messages": messages, "temperature": 0})
    assert status == 200
    await front.until_metric('tierserve_tier_entries{tier="disk"}', answers)


def _hits(tier: str) -> str:
    return f'tierserve_requests_total{{model="m",outcome="hit",tier="{tier}"}}'


async def test_a_file_that_can_not_be_written_is_a_mistake(tmp_path: Path) -> None:
    front = Front(tmp_path, alike("http://127.0.0.1:1"))
    environment = os.environ | {"TIERSERVE__LOG__TRACE": "no/trace.jsonl"}
    ended = subprocess.run(front.command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "log.trace: should be a file that we can write, not " in ended.stderr
    with pytest.raises(ConfigError, match=r"log\.trace"):
        TraceLog(tmp_path, 1000)


async def test_its_lines_are_requests(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    trace = TraceLog(file, 10_000)
    add(trace, 0, model='"\ud800\n')
    # Generated text that looks like one is no token count.
    content = orjson.dumps({"content": '"completion_tokens":9'})
    add(trace, 1, Answer(Encoding.JSON, content))
    usage = b'data: {"usage":{"completion_tokens":3}}\n\n'
    add(trace, 2, Answer(Encoding.SSE, b"data: {}\n\n", usage))
    message = b'data: {"usage":{"output_tokens":0}}\n\ndata: {"usage":{"output_tokens":5}}\n\n'
    add(trace, 3, Answer(Encoding.SSE, message))
    trace.close()
    first, *_ = map(orjson.loads, file.read_bytes().splitlines())
    assert first == {
        "time": 1e9, "key": "key0", "size": len(ANSWER.content), "tokens": 7,
        "model": '"\\ud800\n', "tier": "memory", "outcome": "hit",
    }  # fmt: skip
    assert read(file).requests == [
        TraceRequest("key0", len(ANSWER.content), 1e9, 7),
        TraceRequest("key1", len(content), 1e9 + 1, 0),
        TraceRequest("key2", 10 + len(usage), 1e9 + 2, 3),
        TraceRequest("key3", len(message), 1e9 + 3, 5),
    ]


async def test_a_full_file_makes_room_for_a_new_one(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    trace = TraceLog(file, 5000)
    for number in range(200):
        add(trace, number)
    trace.close()
    both = [path.read_bytes() for path in (rotated(file), file)]
    assert rotated(file).name == "t.1.jsonl"
    assert all(0 < len(data) <= 5000 for data in both)
    keys = [request.key for path in (rotated(file), file) for request in read(path).requests]
    assert keys == [f"key{number}" for number in range(200 - len(keys), 200)]
    assert trace.missing == 0


async def test_goes_on_in_a_new_file_when_its_own_is_moved(tmp_path: Path) -> None:
    file, moved = tmp_path / "t.jsonl", tmp_path / "moved.jsonl"
    trace = TraceLog(file, 5000)
    add(trace, 0)
    async with asyncio.timeout(HANGS_S):
        while not file.stat().st_size:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        file.rename(moved)
        while not file.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # Nor does one that was cut short count for what it held.
        shutil.copy(moved, file)
        os.truncate(file, 0)
    add(trace, 1)
    trace.close()
    assert [[each.key for each in read(path).requests] for path in (moved, file)] == [
        ["key0"], ["key1"],
    ]  # fmt: skip


async def test_goes_on_after_a_line_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    for number in range(2):
        trace = TraceLog(file, 5000)
        add(trace, number)
        trace.close()
        with file.open("ab") as target:
            target.write(b'{"key":"cut')
    TraceLog(file, 5000).close()
    assert [request.key for request in read(file).requests] == ["key0", "key1"]


async def test_what_is_missing_is_counted_and_said(caplog) -> None:
    with caplog.at_level(logging.ERROR):
        trace = TraceLog(Path("/dev/full"), 5000)
        for number in range(100):
            add(trace, number)
        trace.close()
    assert trace.missing == 100
    assert "requests are missing from the trace: [Errno 28]" in caplog.text


async def test_never_holds_more_than_its_bound(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("server.telemetry.trace_log._MAX_PENDING", 0)
    trace = TraceLog(tmp_path / "t.jsonl", 5000)
    add(trace, 1)
    trace.close()
    assert trace.missing == 1
    assert (tmp_path / "t.jsonl").read_bytes() == b""
