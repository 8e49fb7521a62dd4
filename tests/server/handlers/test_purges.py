"""Purges at the edge: what a purge made in another process means for requests, and the tags."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
from aiohttp import web

from server.auth.tenant import open_tenant
from tests.server.conftest import ROLE, WHOLE, Front, Upstream, body, chunk, question, stream
from tests.waiting import HANGS_S
from tiers import DiskCache, Purges

pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def purges_of(front: Front) -> AsyncIterator[Purges]:
    """What another process on the same disk tier does."""
    disk = DiskCache(front.config.parent / "disk", 4 * 1024 * 1024)
    await disk.opened()
    try:
        yield Purges(disk, deadline_s=HANGS_S)
    finally:
        await disk.close()


@pytest.mark.parametrize("stream_it", [False, True])
async def test_a_purge_elsewhere_is_a_miss_at_once(
    front: Front, upstream: Upstream, stream_it: bool
) -> None:
    secret = {"Authorization": "Bearer é-secret"}
    tenant = open_tenant("Bearer é-secret").name
    asked = question(cache={"tags": ["a b", "ü"]}, stream=stream_it)
    labels = ["model:m", f"tenant:{tenant}", "tag:a b", "tag:ü", "all"]
    others = ["model:n", "tenant:anonymous", "tag:a", "key:none"]
    async with purges_of(front) as purges:
        for times, label in enumerate(labels, 1):
            assert "fwd=miss" in (await front.ask(asked, headers=secret))[1]
            for other in others:
                await purges.purge(other)
            for _ in range(3):
                assert "; hit" in (await front.ask(asked, headers=secret))[1]
            assert len(upstream.asked) == times
            await purges.purge(label)
    assert "fwd=miss" in (await front.ask(asked, headers=secret))[1]


async def test_nobody_joins_what_was_purged_and_it_is_never_given_again(
    front: Front, upstream: Upstream
) -> None:
    go, answers = asyncio.Event(), iter(["old", "new"])

    async def slow(http: web.Request) -> web.StreamResponse:
        text = chunk({"content": next(answers)})
        return await stream(http, ROLE, go, text, *WHOLE[2:])

    upstream.handler = slow
    asked = question(stream=True)
    async with purges_of(front) as purges, front.post(asked) as first, front.post(asked) as joined:
        assert joined.headers["Cache-Status"] == "tierserve; fwd=miss; collapsed"
        await purges.purge("tenant:anonymous")
        async with front.post(asked) as second:
            assert second.headers["Cache-Status"] == "tierserve; fwd=miss"
            go.set()
            assert b'"old"' in await first.read()
            assert b'"old"' in await joined.read()
            assert b'"new"' in await second.read()
    for _ in range(3):
        _, cache_status, text = await front.ask_alone(asked)
        assert "; hit" in cache_status
        assert b'"new"' in text
    assert len(upstream.asked) == 2


async def test_a_purged_entry_is_no_fallback_either(front: Front, upstream: Upstream) -> None:
    async def down(http: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    asked = question(model="sie")
    await front.ask_alone(asked)
    upstream.handler = down
    status, cache_status, _ = await front.ask_alone(asked)
    assert status == 200
    assert cache_status.startswith("tierserve; fwd=stale")
    async with purges_of(front) as purges:
        await purges.purge("model:sie")
    assert (await front.ask(asked))[0] == 500


@pytest.mark.parametrize("more", [{}, {"temperature": 1}, {"stream": True}])
async def test_the_engine_never_sees_what_is_meant_for_us(
    front: Front, upstream: Upstream, more: dict
) -> None:
    seen = []

    async def look(http: web.Request) -> web.StreamResponse:
        seen.append(orjson.loads(await http.read()))
        return await stream(http, *WHOLE) if more.get("stream") else web.json_response(body())

    upstream.handler = look
    asked = question(**more)
    for cache in ({"tags": ["x"]}, {"tags": []}, {}, None):
        assert (await front.ask(asked | {"cache": cache}))[0] == 200
    assert len(seen) == (4 if "temperature" in more else 1)
    for body_ in seen:
        body_.pop("stream_options", None)
        assert body_ == asked | {"model": "m"}


@pytest.mark.parametrize(
    ("cache", "param"),
    [
        ([], "cache"),
        ("no-store", "cache"),
        ({"tag": ["a"]}, "cache.tag"),
        ({"tags": "a"}, "cache.tags"),
        ({"tags": ["a"] * 17}, "cache.tags"),
        ({"tags": [1]}, "cache.tags"),
        ({"tags": [""]}, "cache.tags"),
        ({"tags": ["a" * 129]}, "cache.tags"),
        ({"tags": ["a\nb"]}, "cache.tags"),
        ({"tags": ["\u0000"]}, "cache.tags"),
    ],
)
async def test_says_what_is_wrong_with_the_field(
    front: Front, upstream: Upstream, cache: object, param: str
) -> None:
    async with front.post(question(cache=cache)) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"], error["code"]) == (400, param, 400)
        assert error["message"].startswith(param)
    assert not upstream.asked
