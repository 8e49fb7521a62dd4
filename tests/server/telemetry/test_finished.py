"""Finished requests: a line in the access log for each, and counts by tier and outcome."""

import asyncio
import re
from collections import Counter

import orjson
import pytest
from aiohttp import web

from tests.server.conftest import (
    CHAT,
    ROLE,
    Front,
    Upstream,
    held,
    question,
    stream,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_each_answer_leaves_a_line_with_its_id(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask(asked, headers={"X-Request-Id": "the-miss"})
    await front.ask(asked, headers={"X-Request-Id": "the-hit"})
    async with front.session.get("/a%0Ab%1B%22", headers={"X-Request-Id": "odd"}) as response:
        assert response.headers["X-Request-Id"] == "odd"
        # One who leaves before the end is logged as 499.
        await response.read()
    assert upstream.asked[-1].raw_path == "/a%0Ab%1B%22"
    logged = {}
    async with asyncio.timeout(HANGS_S):
        while not logged.keys() >= {"the-miss", "the-hit", "odd"}:
            await asyncio.sleep(0.05)
            # The last one may be on its way.
            whole = front.log.read_bytes().rpartition(b"\n")[0]
            lines = map(orjson.loads, whole.splitlines())
            logged = {line["request_id"]: line for line in lines if "request_id" in line}
    for id_, tier, outcome in (("the-miss", "engine", "miss"), ("the-hit", "memory", "hit")):
        line = logged[id_]
        assert line["message"] == f"POST {CHAT} 200"
        assert (line["tier"], line["outcome"]) == (tier, outcome)
        assert line["ms"] > 0
    assert logged["odd"]["message"] == 'GET /a\nb\x1b" 500'


async def outcomes(front: Front) -> Counter[tuple[str, str]]:
    """Return how many requests there were, by tier and outcome, without ours."""
    async with front.session.get("/metrics") as response:
        text = await response.text()
    line = r'^tierserve_requests_total\{model=".*",outcome="(.+)",tier="(.+)"\} (.+)$'
    found: Counter[tuple[str, str]] = Counter()
    for outcome, tier, count in re.findall(line, text, re.M):
        if outcome != "own":
            found[tier, outcome] += int(float(count))
    return found


async def until_counted(front: Front, expected: Counter[tuple[str, str]]) -> None:
    """Wait for these: a stream is counted when its end has been sent."""
    found: Counter[tuple[str, str]] = Counter()
    async with asyncio.timeout(HANGS_S):
        while found.total() < expected.total():
            found = await outcomes(front)
            await asyncio.sleep(0)
    assert found == expected


async def test_requests_are_counted_by_tier_and_outcome(front: Front, upstream: Upstream) -> None:
    async def refuses(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=500)

    async def breaks(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE)

    counts = await outcomes(front)

    async def asks(asked: dict, tier: str, outcome: str, **options) -> None:
        while "collapsed" in (await front.ask(asked, **options))[1]:
            # The flight before has not landed yet.
            counts["engine", "collapsed"] += 1
        counts[tier, outcome] += 1
        await until_counted(front, counts)

    plain, spare, old = question(), question(model="sie"), question(model="swr")
    for asked in (plain, spare, old):
        await asks(asked, "engine", "miss")
    await asks(plain, "memory", "hit")
    await asks(plain | {"stream": True}, "memory", "hit")
    await asks(plain, "engine", "pass", headers={"Cache-Control": "no-store"})
    await asks(question(temperature=1), "engine", "pass")
    await asks(old, "memory", "stale")
    upstream.handler = refuses
    await asks(question(), "engine", "error")
    await asks(spare, "memory", "stale")
    upstream.handler = breaks
    await asks(question(stream=True), "engine", "error")


async def test_collapsed_and_aborted_requests_are_counted(front: Front, upstream: Upstream) -> None:
    go, counts = asyncio.Event(), await outcomes(front)
    upstream.handler = held(go)
    asked = question(stream=True)
    async with (
        front.post(asked) as first,
        front.post(asked) as second,
        front.post(asked) as third,
    ):
        await third.content.readuntil(b"\n\n")
        third.close()
        counts["engine", "aborted"] += 1
        await until_counted(front, counts)
        go.set()
        for each in (first, second):
            await each.read()
    counts.update([("engine", "miss"), ("engine", "collapsed")])
    await until_counted(front, counts)


def sent(path: str, asked: dict | None = None, version: str = "1.1") -> bytes:
    """A request as it is sent: a POST if there is something to ask."""
    raw = b"" if asked is None else orjson.dumps(asked)
    head = f"{'GET' if asked is None else 'POST'} {path} HTTP/{version}\r\nHost: a\r\n"
    more = f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return (head + more).encode() + raw
