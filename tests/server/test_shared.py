"""Replicas with one shared tier, which hangs, dies, and comes back, while requests go on."""

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.server.conftest import Front, Upstream, counting, held, question, running
from tests.server.shared_tier import AVAILABLE, DEADLINE_MS, STORES, stored
from tests.servers import RedisServer, StoreServer
from tests.waiting import HANGS_S
from tiers.disk.recovery import LOCK

pytestmark = pytest.mark.asyncio(loop_scope="module")

PURGE_ERRORS = "tierserve_shared_purge_errors_total"
LEFT_OUT = "is left out until it answers again"
ANSWERS_AGAIN = "the shared tier answers again"
NOT_SHARED = "purges can't be shared with other machines"
SHARED_AGAIN = "purges are shared with other machines again"


@pytest.fixture
def redis(tmp_path):
    made = RedisServer(tmp_path)
    yield made
    made.kill()


@asynccontextmanager
async def replicas(
    folder: Path, upstream: Upstream, server: StoreServer
) -> AsyncIterator[tuple[Front, Front]]:
    """Two servers with a disk of their own each, which both use the shared tier."""
    shared = {"url": server.url, "deadline_ms": DEADLINE_MS}
    for name in "ab":
        (folder / name).mkdir()
    async with (
        running(folder / "a", upstream, shared=shared) as a,
        running(folder / "b", upstream, shared=shared) as b,
    ):
        for each in (a, b):
            await each.until_metric(AVAILABLE, 1)
        yield a, b


async def stored_question(front: Front, **more) -> dict:
    """Return a question whose answer `front` has stored in the shared tier."""
    asked = question(**more)
    await stored(front, asked)
    return asked


async def test_what_one_replica_stores_the_other_finds(upstream, server, tmp_path) -> None:
    async with replicas(tmp_path, upstream, server) as (a, b):
        asked, before = await stored_question(a), len(upstream.asked)
        details = [(await b.ask(asked))[1].rsplit("=")[-1] for _ in range(3)]
        # What is asked for again moves up.
        assert details == ["shared", "shared", "memory"]
        assert len(upstream.asked) == before
        assert await b.metric('tierserve_tier_hits_total{tier="shared"}') == 2


async def test_replicas_make_one_generation_of_what_both_miss(upstream, server, tmp_path) -> None:
    async with replicas(tmp_path, upstream, server) as pair:
        asked, before = question(), len(upstream.asked)
        go = asyncio.Event()
        upstream.handler = held(go)
        forms = [asked | {"stream": True}] * 10
        waiting = [asyncio.create_task(each.ask(form)) for form in forms for each in pair]
        async with asyncio.timeout(HANGS_S):
            while sum([await each.metric("tierserve_flights_waiting") for each in pair]) < 1:
                pass
        go.set()
        assert {status for status, *_ in await asyncio.gather(*waiting)} == {200}
        assert len(upstream.asked) == before + 1


async def test_what_one_replica_purges_no_other_gives_out(upstream, server, tmp_path) -> None:
    async with replicas(tmp_path, upstream, server) as (a, b):
        asked, other = await stored_question(a), await stored_question(a, cache={"tags": ["doc-1"]})
        del other["cache"]
        for each in (asked, other, asked, other):
            assert "hit" in (await b.ask_alone(each))[1]
        await purge(a, tag="doc-1")
        assert "fwd=miss" in (await b.ask(other))[1]
        assert "hit" in (await b.ask(asked))[1]
        await b.stop()
        await purge(a, all=True)
        # What it has on its own disk is purged too, before it answers the first request.
        await b.start()
        assert "fwd=miss" in (await b.ask(asked))[1]


async def test_a_kill_brings_back_nothing_that_was_purged(upstream, redis, tmp_path) -> None:
    shared = {"url": redis.url, "deadline_ms": DEADLINE_MS}
    async with running(tmp_path, upstream, shared=shared) as front:
        kept = await stored_question(front)
        gone = await stored_question(front, cache={"tags": ["doc-1"]})
        await purge(front, tag="doc-1")
        front.process.kill()
        await front.stop()
        with (tmp_path / "disk" / LOCK).open() as lock:
            # So the file can't be verified, nor opened, and what it knows isn't known.
            fcntl.flock(lock, fcntl.LOCK_EX)
            await front.start()
            # Until the server's purges are known all is a miss.
            async with asyncio.timeout(HANGS_S):
                while not await is_held(front, kept):
                    await front.ready()
            assert not await is_held(front, gone)


async def is_held(front: Front, asked: dict) -> bool:
    async with front.post(asked, headers={"Cache-Control": "only-if-cached"}) as response:
        assert response.status in (200, 504)
        return response.status == 200


async def purge(front: Front, **what) -> None:
    """Purge until all machines know it, which they may not where the shared server is slow."""
    connector = aiohttp.UnixConnector(str(front.socket))
    async with (
        asyncio.timeout(HANGS_S),
        aiohttp.ClientSession("http://admin", connector=connector) as session,
    ):
        status = 503
        while status == 503:
            async with session.post("/purge", json=what) as response:
                status, text = response.status, await response.text()
        assert status in (200, 204), text


async def test_a_new_answer_is_found_while_an_older_one_is_being_stored(
    upstream: Upstream, redis, tmp_path
) -> None:
    shared = {"url": redis.url, "deadline_ms": 500}
    async with running(tmp_path, upstream, shared=shared) as front:
        await stored_question(front)
        upstream.handler = counting()
        redis.hang()
        asked = question()
        texts = []
        # The store of the second waits for that of the first, which waits for the server.
        for mode in ("default", "no-cache", "default", "only-if-cached", "use"):
            status, _, raw = await front.ask(asked | {"cache": {"mode": mode}})
            assert status == 200
            texts.append(orjson.loads(raw)["choices"][0]["message"]["content"])
        assert texts == ["0", "1", "1", "1", "1"]
        redis.go_on()


@pytest.mark.parametrize("how", ["hang", "kill"])
async def test_an_outage_is_counted_and_no_request_fails(upstream, server, tmp_path, how) -> None:
    async with replicas(tmp_path, upstream, server) as (a, b):
        before = await stored_question(a)
        getattr(server, how)()
        while await b.metric(AVAILABLE):
            status, cache_status, _ = await b.ask(question())
            assert (status, cache_status) == (200, "tierserve; fwd=miss")
        await b.until_above(PURGE_ERRORS, 0)
        await b.until_logged(NOT_SHARED)
        log = b.log.read_text()
        # Each is said once until it is over; a slow server may have been given up before, too.
        for failure, end in ((LEFT_OUT, ANSWERS_AGAIN), (NOT_SHARED, SHARED_AGAIN)):
            assert log.count(failure) <= log.count(end) + 1
        server.go_on() if how == "hang" else server.start()
        await b.until_metric(AVAILABLE, 1)
        if how == "hang":
            assert "detail=shared" in (await b.ask(before))[1]
        asked = await stored_question(a)
        assert "detail=shared" in (await b.ask(asked))[1]


async def test_starts_and_stops_while_the_shared_server_is_down(upstream, redis, tmp_path) -> None:
    redis.kill()
    async with running(tmp_path, upstream, shared={"url": redis.url}) as front:
        for _ in range(4):
            assert (await front.ask(question()))[0] == 200
        redis.start()
        redis.hang()
    assert front.process.returncode == 0


async def test_the_password_is_used_and_told_nobody(upstream, redis, tmp_path) -> None:
    assert redis.ask("config set requirepass s3cr3t") == b"+OK"
    for password, metric in (("s3cr3t", STORES), ("s3cr3t2", PURGE_ERRORS)):
        url = f"redis://:{password}@127.0.0.1:{redis.port}/0"
        # Its name is logged.
        folder = tmp_path / str(len(password))
        folder.mkdir()
        async with running(folder, upstream, shared={"url": url, "deadline_ms": 500}) as front:
            # Where the password is wrong purges stay unknown, so nothing is read nor stored.
            async with asyncio.timeout(HANGS_S):
                while await front.metric(metric) == 0:
                    await front.ask(question())
        assert "s3cr3t" not in front.log.read_text()
