"""Two tierserve processes over one disk tier, in front of one upstream."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from server.cache import build, build_lock
from server.config.load import load
from tests.server.conftest import (
    Front,
    Upstream,
    alike,
    answer,
    body,
    held,
    question,
    running,
    skip_unless_runs,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

MISS, COLLAPSED = "tierserve; fwd=miss", "tierserve; fwd=miss; collapsed"
DISK_MISSES = 'tierserve_tier_misses_total{tier="disk"'
ENDS = ("answered", "took_over", "gave_up", "aborted")


@asynccontextmanager
async def two(folder: Path, upstream: Upstream) -> AsyncIterator[list[Front]]:
    async with AsyncExitStack() as stack:
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIERSERVE__TIERS__DISK__PATH", str(folder / "disk"))
            for name in ("a", "b"):
                (folder / name).mkdir()
                made.append(await stack.enter_async_context(running(folder / name, upstream)))
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fronts(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[list[Front]]:
    async with two(tmp_path_factory.mktemp("fronts"), _upstream) as made:
        yield made


def at_last(go: asyncio.Event, then=answer) -> Callable[[web.Request], Awaitable]:
    """Return a handler that begins a stream at once, and answers once `go` is set."""

    async def slow(http: web.Request) -> web.StreamResponse:
        if orjson.loads(await http.read()).get("stream"):
            return await held(go)(http)
        await go.wait()
        return await then(http)

    return slow


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(HANGS_S):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_asked(upstream: Upstream) -> None:
    async def is_asked() -> bool:
        return bool(upstream.asked)

    await until(is_asked)


async def until_one_waits(*fronts: Front) -> None:
    async def one_waits() -> bool:
        return 1 in [await front.metric("tierserve_flights_waiting ") for front in fronts]

    await until(one_waits)


async def waits(front: Front) -> Counter[str]:
    """Return how often the front's waits ended how."""
    metric = 'tierserve_flight_waits_total{{end="{}"}}'.format
    return Counter({end: int(await front.metric(metric(end))) for end in ENDS})


@asynccontextmanager
async def ending(front: Front, *ends: str) -> AsyncIterator[None]:
    """Expect that so many waits end so."""
    expected = await waits(front) + Counter(ends)
    yield

    async def is_so() -> bool:
        return await waits(front) == expected

    await until(is_so)


async def follow(fronts: list[Front], upstream: Upstream, *asked: dict) -> list[asyncio.Task]:
    """Ask the first front, which generates, then the second, all of whose requests wait for it."""
    tasks = [asyncio.create_task(fronts[0].ask(asked[0]))]
    await until_asked(upstream)
    misses = await fronts[1].metric(DISK_MISSES)
    tasks += [asyncio.create_task(fronts[1].ask(each)) for each in asked[1:]]
    await fronts[1].until_metric(DISK_MISSES, misses + len(asked[1:]))
    await until_one_waits(fronts[1])
    assert len(upstream.asked) == 1
    return tasks


async def test_fifty_requests_at_both_are_one_generation(
    fronts: list[Front], upstream: Upstream
) -> None:
    asked, go = question(), asyncio.Event()
    upstream.handler = at_last(go)
    forms = [bool(number & 2) for number in range(50)]
    tasks = [
        asyncio.create_task(fronts[number % 2].ask(asked | {"stream": stream}))
        for number, stream in enumerate(forms)
    ]
    await until_one_waits(*fronts)
    go.set()
    replies = await asyncio.gather(*tasks)
    assert len(upstream.asked) == 1
    for stream, (status, _, text) in zip(forms, replies, strict=True):
        assert status == 200
        assert b'"content":"yes"' in text
        assert text.endswith(b"data: [DONE]\n\n") == stream
    # Who comes last may find it in a tier.
    statuses = [cache_status for _, cache_status, _ in replies if "; hit; " not in cache_status]
    assert statuses.count(MISS) == 1
    assert statuses.count(COLLAPSED) == len(statuses) - 1


@pytest.mark.parametrize("leads", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize("follows", [False, True], ids=["body", "stream"])
async def test_the_other_ones_answer_is_given_and_told_so(
    fronts: list[Front], upstream: Upstream, leads: bool, follows: bool
) -> None:
    asked, go = question(), asyncio.Event()
    upstream.handler = at_last(go)
    same = asked | {"stream": follows}
    if follows:
        same["stream_options"] = {"include_usage": True}
    misses = await fronts[1].metric(DISK_MISSES)
    async with ending(fronts[1], "answered"):
        tasks = await follow(fronts, upstream, asked | {"stream": leads}, same, same)
        go.set()
        (_, leader, _), *followers = await asyncio.gather(*tasks)
    assert leader == MISS
    for status, cache_status, text in followers:
        assert (status, cache_status) == (200, COLLAPSED)
        assert b'"content":"yes"' in text
        assert b'"total_tokens":2' in text
        assert text.endswith(b"data: [DONE]\n\n") == follows
    assert len(upstream.asked) == 1
    assert await fronts[1].metric(DISK_MISSES) == misses + 2


async def fail(_: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "no memory", "code": 500}}, status=500)


async def stop_halfway(_: web.Request) -> web.StreamResponse:
    return web.json_response(body("y", "abort"))


@pytest.mark.parametrize(("ends", "status"), [(fail, 500), (stop_halfway, 200)])
async def test_takes_over_where_the_other_has_no_answer_to_store(
    fronts: list[Front], upstream: Upstream, ends, status: int
) -> None:
    asked, go = question(), asyncio.Event()
    upstream.handler = at_last(go, then=ends)
    async with ending(fronts[1], "took_over"):
        leading, following = await follow(fronts, upstream, asked, asked)
        upstream.handler = answer
        go.set()
        assert (await leading)[0] == status
        assert (await following)[:2] == (200, MISS)
    assert len(upstream.asked) == 2


async def test_takes_over_when_the_others_client_has_gone(
    fronts: list[Front], upstream: Upstream
) -> None:
    asked = question()
    upstream.handler = at_last(asyncio.Event())
    async with ending(fronts[1], "took_over"):
        leading, following = await follow(fronts, upstream, asked, asked)
        upstream.handler = answer
        leading.cancel()
        assert (await following)[:2] == (200, MISS)


async def test_takes_over_from_one_that_is_killed(upstream: Upstream, tmp_path: Path) -> None:
    asked = question(stream=True)
    upstream.handler = held(asyncio.Event())
    async with two(tmp_path, upstream) as fronts, ending(fronts[1], "took_over"):
        leading, following = await follow(fronts, upstream, asked, asked)
        upstream.handler = answer
        fronts[0].process.kill()
        with pytest.raises(aiohttp.ClientError):
            await leading
        status, cache_status, text = await following
    assert (status, cache_status) == (200, MISS)
    assert text.endswith(b"data: [DONE]\n\n")
    assert len(upstream.asked) == 2


async def test_stops_waiting_when_nobody_asks_any_more(
    fronts: list[Front], upstream: Upstream
) -> None:
    asked, go = question(), asyncio.Event()
    upstream.handler = at_last(go)
    async with ending(fronts[1], "aborted"):
        leading, following = await follow(fronts, upstream, asked, asked)
        following.cancel()
    go.set()
    assert (await leading)[:2] == (200, MISS)
    assert len(upstream.asked) == 1


async def ask_while_the_other_generates(
    fronts: list[Front], upstream: Upstream, **options
) -> tuple[int, str, bytes]:
    """Return what the second front says, which asks by itself."""
    asked = question()
    upstream.handler = at_last(asyncio.Event())
    leading = asyncio.create_task(fronts[0].ask(asked))
    await until_asked(upstream)
    upstream.handler = answer
    reply = await fronts[1].ask(asked, **options)
    assert len(upstream.asked) == 2
    leading.cancel()
    await asyncio.wait([leading])
    return reply


async def test_who_wants_a_new_answer_does_not_wait(
    fronts: list[Front], upstream: Upstream
) -> None:
    new = {"Cache-Control": "no-cache"}
    async with ending(fronts[1]):
        reply = await ask_while_the_other_generates(fronts, upstream, headers=new)
    assert reply[:2] == (200, "tierserve; fwd=request")


async def test_what_is_too_old_for_a_client_is_not_given_after_all(
    fronts: list[Front], upstream: Upstream
) -> None:
    asked = question()
    await fronts[0].ask(asked)
    async with asyncio.timeout(HANGS_S):
        while "; hit; " not in (await fronts[1].ask(asked))[1]:
            pass
    reply = await fronts[1].ask(asked, headers={"Cache-Control": "max-age=0"})
    assert reply[:2] == (200, "tierserve; fwd=request")
    assert len(upstream.asked) == 2


async def test_a_wait_has_a_bound(upstream: Upstream, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIERSERVE__CACHE__WAIT_FOR_OTHERS_S", "0.2")
    async with two(tmp_path, upstream) as fronts, ending(fronts[1], "gave_up"):
        reply = await ask_while_the_other_generates(fronts, upstream)
        assert reply[:2] == (200, MISS)


async def test_what_the_other_makes_anew_is_not_made_twice(
    fronts: list[Front], upstream: Upstream
) -> None:
    asked, go = question(model="swr"), asyncio.Event()
    await fronts[0].ask(asked)
    upstream.asked.clear()
    upstream.handler = at_last(go)
    async with asyncio.timeout(HANGS_S):
        while not upstream.asked:
            # It is stale at once, and made anew when the flight that made it has landed.
            _, stale, _ = await fronts[0].ask(asked)
    _, other_stale, _ = await fronts[1].ask(asked)
    await until_one_waits(fronts[1])
    assert len(upstream.asked) == 1
    assert "; hit; ttl=-" in stale
    assert "; hit; ttl=-" in other_stale
    go.set()


@pytest.mark.parametrize(
    ("text", "withholds", "waits"),
    [
        ("cache: {wait_for_others_s: 10}", False, True),
        ("cache: {wait_for_others_s: 0}", False, False),
        # What another process could not see when it is stored is nothing to wait for.
        ("tiers: {write: on_evict}", False, False),
        ("tiers: {disk: {durability: interval}}", False, False),
        ("tiers: {disk: null}", False, False),
        # Nor what isn't given out, since the shared tier's purges can't be read.
        ("cache: {wait_for_others_s: 10}", True, False),
    ],
)
async def test_waits_only_for_what_can_be_seen(
    tmp_path: Path, monkeypatch, text: str, withholds: bool, waits: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(text)
    config = load(tmp_path / "c.yaml")
    chain, _ = build(config)
    chain.purges.withholds = withholds
    # As another process would: its lock is that of another open file.
    turns, others = build_lock(config, chain), build_lock(config, chain)
    async with turns.acquire("k", 0, 0) as nothing:
        assert nothing is None
        waiting = asyncio.create_task(others.acquire("k", 0, 0).__aenter__())
        await asyncio.sleep(0)
        assert others.stats.waiting == waits
        waiting.cancel()
        await asyncio.wait([waiting])
    for each in (turns, others, chain):
        await each.close()


UNSHARED = ("unshare", "--pid", "--fork", "--kill-child")
if os.geteuid():
    UNSHARED += ("--map-root-user",)


class Contained(Front):
    """A server that is process 1 of a PID namespace of its own, as in a container."""

    wrapper = UNSHARED

    async def stop(self) -> None:
        # `unshare` itself passes no signals on.
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            os.kill(child, signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), HANGS_S)
        await super().stop()


@pytest.mark.parametrize("kind", [Contained, Front])
async def test_containers_use_one_disk_tier_in_turn(
    upstream: Upstream, tmp_path: Path, kind: type[Front]
) -> None:
    skip_unless_runs(*UNSHARED)
    disk = {"path": str(tmp_path / "disk"), "max_bytes": "4MiB"}
    fronts = []
    for name, each in (("a", Contained), ("b", kind)):
        (tmp_path / name).mkdir()
        fronts.append(each(tmp_path / name, alike(upstream.url), disk=disk))
    first, second = fronts
    asked, of_second = question(), question()
    try:
        await first.start()
        assert (await first.ask(asked))[1] == MISS
        await second.start()
        # What the first one has on disk it doesn't find, and its own answers are in memory alone.
        only = {"Cache-Control": "only-if-cached"}
        assert (await second.ask(asked, headers=only))[0] == 504
        assert (await second.ask(of_second))[1] == MISS
        assert "detail=memory" in (await second.ask_alone(of_second))[1]
        await second.until_logged("processes that share a file should share a PID namespace")
        assert "PID namespace" not in first.log.read_text()
        await first.stop()

        async def finds_it() -> bool:
            return (await second.ask(asked, headers=only))[0] == 200

        async def stores() -> bool:
            return await second.metric('tierserve_tier_stores_total{tier="disk"') > 0

        await until(finds_it)
        assert (await second.ask(question()))[0] == 200
        await until(stores)
    finally:
        for front in fronts:
            if front.process.returncode is None:
                await front.stop()
    assert [front.process.returncode for front in fronts] == [0, 0]
