"""How a server leaves: it isn't ready, still serves, closes each connection, and loses nothing."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.server.conftest import (
    CHAT,
    ROLE,
    WHOLE,
    Front,
    Upstream,
    alike,
    held,
    question,
    running,
    stream,
)
from tests.server.raw_client import RawConnection, Reply
from tests.server.workers.fleet import Fleet
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOR_EVER = {"server": {"drain_s": 3600}}
with_workers = pytest.mark.parametrize("workers", [1, 2])


def raw(method: str, path: str, asked: dict | None = None) -> bytes:
    body = b"" if asked is None else orjson.dumps(asked)
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


@asynccontextmanager
async def connected(front: Front) -> AsyncIterator[RawConnection]:
    connection = RawConnection(front.port)
    await connection.open()
    try:
        yield connection
    finally:
        connection.close()


async def exchange(connection: RawConnection, data: bytes) -> Reply:
    await connection.send(data)
    async with asyncio.timeout(HANGS_S):
        reply = await connection.reply_to("POST")
    assert reply is not None
    return reply


async def asked_anew(front: Front, data: bytes) -> Reply:
    async with connected(front) as connection:
        return await exchange(connection, data)


async def until_all_drain(fleet: Front, workers: int) -> None:
    """Wait until each process says on new connections that it isn't ready."""
    seen: set[str | None] = set()
    async with asyncio.timeout(HANGS_S):
        while len(seen) < workers:
            reply = await asked_anew(fleet, raw("GET", "/ready"))
            if reply.status == 503:
                id_ = reply.header("X-Request-Id")
                seen.add(id_ and id_[:24])


@with_workers
async def test_it_serves_on_and_each_answer_closes_its_connection(
    upstream: Upstream, tmp_path: Path, workers: int
) -> None:
    kind = Fleet if workers > 1 else Front
    async with kind(tmp_path, alike(upstream.url), sections=FOR_EVER) as front:
        asked = raw("POST", CHAT, question())
        async with connected(front) as known, connected(front) as idle:
            for _ in range(5):
                assert (await exchange(known, asked)).header("Connection") is None
            assert (await exchange(idle, raw("GET", "/health"))).status == 200
            front.process.terminate()
            await until_all_drain(front, workers)
            reply = await exchange(known, asked)
            assert "; hit; " in str(reply.header("Cache-Status"))
            assert reply.header("Connection") == "close"
            assert (await known.rest(), known.has_ended) == (b"", True)
            # One that has idled is still good for a request.
            reply = await exchange(idle, raw("POST", CHAT, question(stream=True)))
            assert reply.body.endswith(b"data: [DONE]\n\n")
            assert reply.header("Connection") == "close"
        for data in (raw("GET", "/health"), asked, raw("POST", "/v1/others", {})):
            reply = await asked_anew(front, data)
            assert (reply.status, reply.header("Connection")) == (200, "close")
        ready = await asked_anew(front, raw("GET", "/ready"))
        assert b"stopping" in ready.body
        assert int(ready.header("Retry-After") or 0) > 0
        # A second signal doesn't wait.
        assert await front.end_by_signals() == 130


@with_workers
async def test_it_ends_after_the_drain_and_what_is_under_way(
    upstream: Upstream, tmp_path: Path, workers: int
) -> None:
    go, drain_s = asyncio.Event(), 0.5
    upstream.handler = held(go)
    sections = {"server": {"drain_s": drain_s, "workers": workers}}
    async with running(tmp_path, upstream, sections=sections) as front:
        async with front.post(question(stream=True)) as response:
            await response.content.readuntil(b"\n\n")
            began = time.monotonic()
            front.process.terminate()
            # Who is slow may not see that it isn't ready before.
            await front.until_ready(0)
            assert time.monotonic() >= began + drain_s
            go.set()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(front.process.wait(), HANGS_S) == 0


async def test_an_interrupt_does_not_drain(upstream: Upstream, tmp_path: Path) -> None:
    async with running(tmp_path, upstream, sections=FOR_EVER) as front:
        front.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(front.process.wait(), HANGS_S) == 0


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
async def test_a_body_that_still_comes_is_taken(
    upstream: Upstream, tmp_path: Path, path: str
) -> None:
    data = raw("POST", path, question(padding="x" * 10_000))
    async with running(tmp_path, upstream) as front, connected(front) as connection:
        await connection.send(data[:5_000])
        # Comes later, so that the beginning has been read then.
        await front.metric("tierserve_requests_total")
        front.process.terminate()
        await front.until_ready(0)
        reply = await exchange(connection, data[5_000:])
        assert (reply.status, reply.header("Connection")) == (200, "close")
        assert await asyncio.wait_for(front.process.wait(), HANGS_S) == 0


async def test_without_a_grace_what_is_under_way_is_cut(upstream: Upstream, tmp_path: Path) -> None:
    never = asyncio.Event()
    upstream.handler = lambda http: stream(http, ROLE, never, *WHOLE)
    sections = {"server": {"shutdown_grace_s": 0}}
    async with (
        running(tmp_path, upstream, sections=sections) as front,
        front.post(question(stream=True)) as response,
    ):
        await response.content.readuntil(b"\n\n")
        front.process.terminate()
        assert await asyncio.wait_for(front.process.wait(), HANGS_S) == 0
        with pytest.raises(aiohttp.ClientError):
            await response.read()
