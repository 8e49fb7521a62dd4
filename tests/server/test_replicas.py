"""Two replicas whose clocks differ, and one of which alone is cut off from their Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import aiohttp
import orjson
import pytest
from aiohttp import web

from tests.server.conftest import Front, Upstream, alike, body, question
from tests.server.shared_tier import AVAILABLE, DEADLINE_MS, stored
from tests.servers import RedisServer, free_port
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

AHEAD_S = 100
CACHED = {"Cache-Control": "only-if-cached"}
WITH_CLOCK = f"""
import sys, time
real = time.time
time.time = lambda: real() + {AHEAD_S}
from server.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Ahead(Front):
    """A replica whose clock is ahead."""

    @property
    def command(self) -> list[str]:
        python, _, _, *arguments = super().command
        return [python, "-c", WITH_CLOCK, *arguments]


class Relay:
    """The way to a server at an address of its own; while it is cut, bytes vanish in it."""

    address = "127.0.0.2"

    def __init__(self, port: int) -> None:
        self.port, self._to = free_port(), port
        self._passes = asyncio.Event()
        self._passes.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        self._passes.clear()

    def join(self) -> None:
        """Connections that were cut don't come back, as after a long time."""
        for task in self._tasks:
            task.cancel()
        self._passes.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.address, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.join()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Also if it was cancelled before it began.
        task.add_done_callback(lambda _: writer.close())

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = None
        try:
            await self._passes.wait()
            from_there, there = await asyncio.open_connection("127.0.0.1", self._to)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, there))
                both.create_task(self._copy(from_there, writer))
        except* OSError:
            pass
        finally:
            if there is not None:
                there.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._passes.wait()
            writer.write(data)
        with suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def replicas(folder: Path, upstream: Upstream) -> AsyncIterator[tuple[Front, Front, Relay]]:
    """Two replicas, and what is between the second, whose clock is ahead, and Redis."""
    redis = RedisServer(folder)
    models = alike(upstream.url)
    try:
        async with Relay(redis.port) as relay:
            urls = redis.url, f"redis://{relay.address}:{relay.port}/0"
            made = []
            for kind, url in zip((Front, Ahead), urls, strict=True):
                (folder / kind.__name__).mkdir()
                shared = {"url": url, "deadline_ms": DEADLINE_MS}
                # The first with workers, which its clock's patch wouldn't reach.
                sections = {"server": {"workers": 2}} if kind is Front else {}
                options = {"sections": sections, "shared": shared}
                made.append(kind(folder / kind.__name__, models, **options))
            async with made[0] as one, made[1] as two:
                for each in made:
                    await until_available(each, 1)
                yield one, two, relay
    finally:
        redis.kill()


async def until_available(front: Front, value: int) -> None:
    async with asyncio.timeout(HANGS_S):
        while await front.metric(AVAILABLE) != value:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def purge(front: Front, tag: str) -> int:
    """Return the status of a purge; while Redis is slow to answer, it is 503, too."""
    connector = aiohttp.UnixConnector(str(front.socket))
    async with (
        aiohttp.ClientSession("http://admin", connector=connector) as session,
        session.post("/purge", json={"tag": tag}) as response,
    ):
        await response.read()
        return response.status


async def purged(front: Front, tag: str) -> None:
    """Purge until all machines know it."""
    async with asyncio.timeout(HANGS_S):
        while await purge(front, tag) != 200:
            pass


async def said(front: Front, asked: dict) -> str:
    status, _, raw = await front.ask(asked)
    assert status == 200
    return text_of(raw)


def text_of(raw: bytes) -> str:
    return orjson.loads(raw)["choices"][0]["message"]["content"]


async def found(front: Front, asked: dict) -> tuple[str, int]:
    """Return what a replica finds, which is nothing while it can't read from Redis, and its age."""
    async with asyncio.timeout(HANGS_S):
        while True:
            async with front.post(asked, headers=CACHED) as response:
                raw = await response.read()
                if response.status == 200:
                    return text_of(raw), int(response.headers["Age"])
            assert response.status == 504


async def test_nothing_purged_comes_back_to_replicas_that_were_cut_off(upstream, tmp_path) -> None:
    number = iter(range(1000))

    async def count(_: web.Request) -> web.StreamResponse:
        return web.json_response(body(str(next(number))))

    upstream.handler = count
    async with replicas(tmp_path, upstream) as (one, two, relay):
        by_one, by_two, late = (question(cache={"tags": [tag]}) for tag in ("one", "two", "late"))
        kept = question()
        old = {}
        for name, asked in (("one", by_one), ("two", by_two), ("kept", kept)):
            old[name] = text_of(await stored(two, asked))
            # However far its clock is ahead, it is found, and its age is right.
            text, age_s = await found(one, asked)
            assert text == old[name]
            assert age_s < AHEAD_S
        relay.cut()
        await until_available(two, 0)
        assert await purge(two, "two") == 503
        # It knows a purge with a number that is ahead of all that the other will give.
        old["late"] = await said(two, late)
        for tag in ("one", "late"):
            await purged(one, tag)
        assert await said(two, kept) == old["kept"]
        relay.join()
        await until_available(two, 1)
        for name, asked in (("one", by_one), ("late", late)):
            assert await said(two, asked) != old[name]
        # Its own purge reaches the other one with its next poll.
        async with asyncio.timeout(HANGS_S):
            while await said(one, by_two) == old["two"]:
                pass
        for front in (one, two):
            assert (await found(front, kept))[0] == old["kept"]
            for name, asked in (("one", by_one), ("two", by_two), ("late", late)):
                assert await said(front, asked) != old[name]
