"""Upstreams over HTTP: which of them get requests, and how many."""

import asyncio
from pathlib import Path

import pytest

from tests.server.conftest import (
    Front,
    Upstream,
    answer,
    held,
    question,
    running,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_dead_upstream_costs_hits_nothing(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask(asked)
    await upstream.stop()
    await front.until_ready(503)
    assert "hit" in (await front.ask(asked))[1]
    async with front.post(question()) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        assert (await response.json())["error"]["type"] == "ServiceUnavailableError"
    assert await front.metric('tierserve_engine_state{model="m",state="down"') == 1
    await upstream.start()
    await front.until_ready()
    assert (await front.ask(question()))[0] == 200


async def test_an_upstream_that_takes_no_connection_is_not_ready(
    own_upstream: Upstream, tmp_path
) -> None:
    async with running(tmp_path, own_upstream) as front:
        assert (await front.ask(question()))[0] == 200
        for site in list(own_upstream._runner.sites):
            await site.stop()
        await front.until_ready(503)
    assert f"{own_upstream.url} is not ready" in front.log.read_text()


async def test_upstreams_take_turns_and_stand_in_for_each_other(tmp_path) -> None:
    async with Upstream() as one, Upstream() as other, running(tmp_path, one, other) as front:
        async with asyncio.timeout(60):
            while not (one.asked and other.asked):
                assert (await front.ask(question()))[0] == 200
        await one.stop()
        statuses = {(await front.ask(question()))[0] for _ in range(4)}
        assert statuses == {200}


async def test_more_than_the_engine_takes_is_sent_away(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERSERVE__MODELS__M__MAX_REQUESTS", "2")
    go = asyncio.Event()
    async with running(tmp_path, upstream) as front:
        known = question()
        await front.ask(known)
        upstream.handler = held(go)
        asked = [question(stream=True), question(stream=True)]
        waiting = [asyncio.create_task(front.ask(each)) for each in asked]
        async with asyncio.timeout(60):
            while len(upstream.asked) < 3:
                await front.ready()
        for more in (question(), question(temperature=1)):
            async with front.post(more) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
                assert "as many requests" in (await response.json())["error"]["message"]
        assert "hit" in (await front.ask(known))[1]
        go.set()
        assert [status for status, *_ in await asyncio.gather(*waiting)] == [200, 200]
        upstream.handler = answer
        assert (await front.ask(question()))[0] == 200
