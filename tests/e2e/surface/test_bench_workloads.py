"""Workloads against the real engine: words are its tokens, and runs are cold."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import orjson
import pytest
import pytest_asyncio

from server.bench.cache_state import Admin, CacheState, clean, is_tierserve, new_run, prepare
from server.bench.load import Target
from server.bench.workload import Step
from server.bench.workloads import Common, build
from tests.e2e.conftest import MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    await asyncio.to_thread(server.wait_ready)
    headers = {"Content-Type": "application/json"}
    unbounded = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(server.url, headers=headers, timeout=unbounded) as made:
        yield made


async def ask(session: aiohttp.ClientSession, step: Step) -> tuple[str, bytes]:
    """Return `Cache-Status` and body of an answer that isn't that of the flight before."""
    while True:
        async with session.post(step.path, data=step.body) as response:
            body = await response.read()
            assert response.status == 200, body
            if "collapsed" not in (status := response.headers["Cache-Status"]):
                return status, body


@pytest.mark.parametrize("tokens", [8, 250])
async def test_words_are_tokens(session: aiohttp.ClientSession, tmp_path, tokens: int) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"Timestamp,Request tokens,Response tokens\n1,{tokens},1\n")
    common = Common(MODEL, route="completions", stream=False)
    _, body = await ask(session, build(f"burstgpt:{file}", common).session(0).steps[0])
    assert orjson.loads(body)["usage"]["prompt_tokens"] == tokens


async def test_runs_are_cold_and_leave_nothing(
    session: aiohttp.ClientSession, server: Server
) -> None:
    assert await is_tierserve(Target(server.url))
    for _ in range(2):
        state = CacheState("cold", new_run(), tags=True)
        common = state.common(Common(MODEL, stream=False, max_tokens=1))
        (step,) = build("zipf", common).session(0).steps
        said = [(await ask(session, step))[0].partition("; ttl")[0] for _ in range(2)]
        assert said == ["tierserve; fwd=miss", "tierserve; hit"]
        assert await clean(state, Admin(str(server.temporary / "admin.sock"))) is None
        assert (await ask(session, step))[0] == "tierserve; fwd=miss"


async def test_what_was_warmed_is_a_hit(session: aiohttp.ClientSession) -> None:
    state = CacheState("warm", new_run(), tags=True)
    workload = build("search:prompts=3,unique=0", state.common(Common(MODEL, max_tokens=2)))

    async def send(step: Step) -> bool:
        return bool(await ask(session, step))

    warmed = await prepare(
        state, workload, send, requests=10, concurrency=3, on_progress=lambda _: None
    )
    assert warmed == (3, 0, True)
    for number in range(5):
        status, _ = await ask(session, workload.session(number).steps[0])
        assert "hit" in status
