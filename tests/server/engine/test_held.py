"""Requests that find no engine: refused at once or held, counted, and what serves without one."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

from tests.server.conftest import CHAT, Front, Upstream, alike, answer, question, running
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOUND_NONE = 'tierserve_no_engine_total{model="m"}'
HELD = 'tierserve_held_requests{model="m"}'
FOR_EVER = {"wait_for_engine_s": 3600}


class Absent(Upstream):
    """An upstream that isn't there yet."""

    async def stop(self) -> None:
        if hasattr(self, "_runner"):
            await super().stop()


@pytest_asyncio.fixture(loop_scope="module")
async def absent() -> AsyncIterator[Absent]:
    made = Absent()
    yield made
    await made.stop()


async def answer_or_greet(http: web.Request) -> web.StreamResponse:
    if http.headers.get("Upgrade") != "websocket":
        return await answer(http)
    socket = web.WebSocketResponse()
    await socket.prepare(http)
    await socket.send_str("hi")
    await socket.close()
    return socket


class Waiting(Front):
    """A server whose upstream isn't there, and which serves nevertheless."""

    def __init__(self, folder: Path, upstream: Upstream, server=None, **fields) -> None:
        models = alike(upstream.url)
        models["m"] |= fields
        models["n"] |= {"wait_for_engine_s": 0.01}
        super().__init__(folder, models, sections={"server": {"ready": "tiers"} | (server or {})})

    async def until(self, line: str, value: float) -> None:
        async with asyncio.timeout(HANGS_S):
            while await self.metric(line) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
async def test_requests_are_held_until_there_is_an_engine(
    absent: Absent, tmp_path: Path, workers: int
) -> None:
    async with Waiting(tmp_path, absent, {"workers": workers}, **FOR_EVER) as front:
        asked = [front.ask(question(**more)) for more in ({}, {"stream": True}, {"temperature": 1})]
        held = [asyncio.create_task(each) for each in asked]
        passed = asyncio.create_task(front.session.post("/v1/others", json={}))
        opened = asyncio.create_task(front.session.ws_connect("/v1/realtime"))
        await front.until(HELD, 5)
        # All count those that are held, but each those that it has refused or held itself, and one
        # that is slow is left out of the metrics.
        await front.until(FOUND_NONE, 5)
        # What no engine is started for isn't held, nor counted.
        for path in ("/v1/models", "/version"):
            async with front.session.get(path) as reply:
                await reply.read()
        absent.handler = answer_or_greet
        await absent.start()
        async with asyncio.timeout(HANGS_S):
            async with await opened as socket:
                assert await socket.receive_str() == "hi"
            assert [(await each)[0] for each in held] == [200, 200, 200]
            async with await passed as reply:
                assert reply.status == 200
        await front.until(HELD, 0)
        assert await front.metric(FOUND_NONE) == 5


async def test_holding_has_bounds(absent: Absent, tmp_path: Path) -> None:
    async with Waiting(tmp_path, absent, max_requests=1, **FOR_EVER) as front:
        held = asyncio.create_task(front.ask(question()))
        await front.until(HELD, 1)
        async with front.post(question()) as reply:
            assert reply.status == 503
            assert int(reply.headers["Retry-After"]) > 0
        # A client that leaves makes room.
        held.cancel()
        await front.until(HELD, 0)
        held = asyncio.create_task(front.ask(question()))
        await front.until(HELD, 1)
        assert await front.metric(FOUND_NONE) == 3
        # One that has waited for long is refused.
        for more in ({}, {"stream": True}):
            assert (await front.ask(question(model="n", **more)))[0] == 503
        of_n = [each.replace('"m"', '"n"') for each in (FOUND_NONE, HELD)]
        assert [await front.metric(each) for each in of_n] == [2, 0]
        front.process.terminate()
        async with asyncio.timeout(HANGS_S):
            assert (await held)[0] == 503
            assert await front.process.wait() == 0


async def test_a_stale_answer_is_not_held(own_upstream: Upstream, tmp_path: Path) -> None:
    models = alike(own_upstream.url)
    models["sie"] |= FOR_EVER
    async with Front(tmp_path, models, sections={"server": {"ready": "tiers"}}) as front:
        asked = question(model="sie")
        await front.until_ready(200, model="sie")
        assert (await front.ask_alone(asked))[0] == 200
        await own_upstream.stop()
        # At once, when no probe has failed yet, and later.
        for times in (1, 2):
            async with asyncio.timeout(HANGS_S):
                assert "; detail=" in (await front.ask_alone(asked))[1]
            # But it is asked for.
            assert await front.metric(FOUND_NONE.replace('"m"', '"sie"')) == times
            await front.until_ready(503, model="sie")


async def test_hits_are_served_without_an_engine(own_upstream: Upstream, tmp_path: Path) -> None:
    asked = question()
    async with running(tmp_path, own_upstream) as front:
        assert (await front.ask(asked))[0] == 200
    await own_upstream.stop()
    async with Waiting(tmp_path, own_upstream) as front:
        assert "; hit; " in (await front.ask(asked))[1]
        async with front.session.post(CHAT, json=question()) as reply:
            assert reply.status == 503


async def test_a_fallback_answers_what_is_held_no_longer(
    absent: Absent, own_upstream: Upstream, tmp_path: Path
) -> None:
    models = {
        "m": {"upstreams": [absent.url], "vllm": {}, "fallback": "n", "max_requests": 1},
        "late": {"upstreams": [absent.url], "vllm": {}, "fallback": "n"},
        # A worker may learn later than another that it is ready.
        "n": {"upstreams": [own_upstream.url], "vllm": {}} | FOR_EVER,
    }
    models["m"] |= FOR_EVER
    models["late"]["wait_for_engine_s"] = 0.01
    sections = {"server": {"ready": "any", "workers": 2, "drain_s": 3600}}
    async with Front(tmp_path, models, sections=sections) as front:

        async def ask(**more) -> str | None:
            async with front.post(question(**more)) as reply:
                await reply.read()
                assert reply.status == 200
                return reply.headers.get("X-Tierserve-Fallback")

        first = asyncio.create_task(ask(model="m"))
        await front.until_above(HELD, 0)
        assert own_upstream.asked == []
        # There is no room for another, and one has waited for long.
        for more in ({}, {"stream": True}, {"temperature": 1}, {"model": "late"}):
            assert await ask(**{"model": "m"} | more) == "n"
        front.process.terminate()
        async with asyncio.timeout(HANGS_S):
            assert await first == "n"
        front.process.send_signal(signal.SIGINT)
        await front.end_by_signals()
