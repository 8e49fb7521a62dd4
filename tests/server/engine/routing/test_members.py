"""Upstreams that come and go while a model runs, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import orjson
import pytest
import pytest_asyncio
from aiohttp import ConnectionTimeoutError, web

from server.auth.limits import Limits
from server.auth.tenant import open_tenant
from server.engine.routing.addresses import Addresses, LookUp, UpstreamAddress, look_up
from server.engine.routing.held import HeldRequests
from server.engine.routing.load import Estimate
from server.engine.routing.members import Members
from server.engine.routing.upstreams import Upstreams
from server.engine.turns import Turns
from server.engine.upstream import ENGINE_URL, UnavailableError
from server.engine.upstream import Upstream as EngineServer
from server.protocol.model_names import ModelNames
from server.protocol.request import ParsedRequest, parse_request
from server.workers.shared_counters import SharedCounters
from tests.server.conftest import CHAT, WHOLE, Upstream, held, of_vllm
from tests.server.engine.routing.ejected import eject
from tests.waiting import HANGS_S

GET = {"data": None, "headers": {}}


def make(address: UpstreamAddress) -> EngineServer:
    return EngineServer(address.url, ip=address.ip, timeout_s=60)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(HANGS_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def watched(*urls: str, look_up: LookUp = look_up, **options) -> AsyncIterator[Upstreams]:
    addresses = Addresses(urls, look_up)
    made = Upstreams(addresses, make, max_requests=8, turns=Turns(), **options)
    watching = asyncio.create_task(made.watch())
    try:
        yield made
        assert not watching.done()
    finally:
        watching.cancel()
        await made.close()


@pytest_asyncio.fixture
async def engines() -> AsyncIterator[list[Upstream]]:
    async with Upstream() as one, Upstream() as two, Upstream() as three:
        yield [one, two, three]


async def test_one_that_leaves_ends_what_it_has_under_way(engines: list[Upstream]) -> None:
    one, two, _ = engines
    go = asyncio.Event()
    one.handler = held(go)
    async with watched(one.url) as upstreams:
        await until(lambda: upstreams.ready)
        (gone,) = upstreams.all
        async with upstreams.request("POST", CHAT, data=b"{}", headers={}) as reply:
            upstreams.replace([two.url])
            # At once, before the first probe of the other has an answer.
            async with upstreams.request("GET", "/", **GET) as other:
                assert other.url.port == two.port
                assert upstreams.in_flight == 2
            assert not gone.unpooled.closed
            go.set()
            assert await reply.read() == b"".join(WHOLE)
            # Nobody knows whether it stops now.
            keeps = await upstreams.keeps_generating(reply, model="m", headers={})
            assert not keeps
        assert upstreams.in_flight == 0
        await until(lambda: gone.unpooled.closed)
        # One that isn't there is noticed by the first request.
        upstreams.replace(["http://127.0.0.1:1"])
        with pytest.raises(UnavailableError):
            await upstreams.request("GET", "/", **GET).__aenter__()
        assert not upstreams.ready


async def test_no_request_is_refused_while_a_name_takes_the_place_of_all(
    engines: list[Upstream],
) -> None:
    one, two, _ = engines
    is_asked, go = asyncio.Event(), asyncio.Event()

    async def look_up(_: str) -> Sequence[str]:
        is_asked.set()
        await go.wait()
        return ["127.0.0.1"]

    async with watched(one.url, look_up=look_up) as upstreams:
        await until(lambda: upstreams.ready)
        upstreams.replace([f"dns+http://engines.test:{two.port}"])
        await is_asked.wait()
        asked: list[int | None] = []
        while two.port not in asked:
            async with upstreams.request("GET", "/", **GET) as reply:
                asked.append(reply.url.port)
            go.set()
        assert asked[0] == one.port


async def test_those_that_stay_keep_their_state(engines: list[Upstream]) -> None:
    one, two, three = engines
    async with watched(one.url, two.url) as upstreams:
        await until(lambda: all(each.ready for each in upstreams.all))
        kept = upstreams.members[0]
        assert kept.load.begin(1000.0)
        eject(kept.upstream)
        since = kept.upstream.ready_since
        upstreams.replace([three.url, one.url, one.url])
        assert [each.address.url for each in upstreams.members] == [three.url, one.url]
        assert upstreams.members[1] is kept
        assert (kept.load.tokens, upstreams.in_flight) == (1000.0, 1)
        assert (kept.upstream.ready_since, kept.upstream.takes_requests) == (since, False)
        # It leaves, and is back before its request has ended.
        upstreams.replace([three.url])
        upstreams.replace([one.url])
        assert upstreams.members == (kept,)
        kept.load.end(1000.0)
        assert not kept.upstream.unpooled.closed


async def test_one_that_has_left_is_passed_over(engines: list[Upstream]) -> None:
    """A request has been placed, and waits for the first in its order."""
    one, two, _ = engines
    async with watched(one.url, two.url, routing="round_robin") as upstreams:
        await until(lambda: all(each.ready for each in upstreams.all))
        first, second = upstreams.members

        async def leave_then_refuse(*_: object, **__: object) -> None:
            upstreams.replace([one.url])
            await until(lambda: second.upstream.unpooled.closed)
            raise ConnectionTimeoutError

        first.upstream.request = leave_then_refuse  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await upstreams.request("GET", "/", **GET).__aenter__()
        assert upstreams.in_flight == 0


async def test_one_that_comes_back_is_probed_and_ends_waits(engines: list[Upstream]) -> None:
    one, _, _ = engines
    one.handler = held(go := asyncio.Event())
    async with watched(one.url, held=HeldRequests(3600, 8)) as upstreams:
        await until(lambda: upstreams.ready)
        async with upstreams.request("POST", CHAT, data=b"{}", headers={}) as begun:
            upstreams.replace(["http://127.0.0.1:1"])

            async def ask() -> int:
                request = upstreams.request("POST", CHAT, data=b"{}", headers={}, demand="held")
                async with request as reply:
                    await reply.read()
                    return reply.status

            asking = asyncio.create_task(ask())
            await until(lambda: upstreams.held.waiting)
            # With what it has under way, it is still known.
            upstreams.replace([one.url])
            assert not upstreams.ready
            go.set()
            await begun.read()
            assert await asyncio.wait_for(asking, HANGS_S) == 200
        assert (upstreams.held.waiting, upstreams.in_flight) == (0, 0)


async def test_what_was_held_is_kept_if_its_engine_goes_on(tmp_path) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.json_response({})

    path = str(tmp_path / "engine.sock")
    engine = EngineServer(ENGINE_URL, timeout_s=60, socket=path)
    upstreams = Upstreams(
        Addresses([ENGINE_URL]),
        lambda _: engine,
        max_requests=8,
        turns=Turns(),
        held=HeldRequests(3600, 8),
    )
    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.UnixSite(runner, path).start()

    async def keeps(*, stops: bool) -> bool:
        async with upstreams.request("POST", CHAT, data=b"{}", headers={}, demand="held") as reply:
            await reply.read()
            if stops:
                engine.mark_stopped()
        return await upstreams.keeps_generating(reply, model="m", headers={})

    for stops in (False, True):
        asking = asyncio.create_task(keeps(stops=stops))
        await until(lambda: upstreams.held.waiting)
        engine.ready = True
        assert await asyncio.wait_for(asking, HANGS_S) is not stops
        engine.mark_stopped()
        engine.mark_started()
    await upstreams.close()
    await runner.cleanup()


async def test_usages_of_those_that_left_are_free_for_others() -> None:
    counters = SharedCounters.create(1, rows=2)

    def members_at(*urls: str) -> Members:
        return Members(
            map(UpstreamAddress, urls), make, counters.usage, Limits(max_requests=8), Estimate()
        )

    members = members_at("http://a:1", "http://b:1")
    for number in range(9):
        members.replace(map(UpstreamAddress, [f"http://{number}:1", "http://b:1"]))
        (new, kept) = members.all
        assert members.begin(new, 1.0)
        # Each has a row of its own.
        assert (new.load.in_flight, kept.load.in_flight) == (1, 0)
        members.end(new, 1.0)
    await members.close()
    counters.close()


METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a } 1"} 3.0
vllm:num_requests_running{engine="1",model_name="a } 1"} 1.0
vllm:num_requests_waiting{engine="0",model_name="a } 1"} 16.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 100.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
"""


async def test_requests_of_others_are_load(engines: list[Upstream], monkeypatch) -> None:
    monkeypatch.setattr("server.engine.routing.members._READ_EVERY_S", 0.01)
    one, two, _ = engines
    told: list[str | None] = [METRICS]

    async def metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(text=told[0]) if told[0] is not None else web.Response(status=404)

    one.metrics = metrics
    async with watched(one.url, two.url, reads_queues=True) as upstreams:
        busy, idle = upstreams.members
        await until(lambda: busy.load.foreign == 20)
        # Our own are among them.
        busy.load.begin(1.0)
        await until(lambda: busy.load.foreign == 19)
        assert busy.load.tokens > 19 * 200
        assert (idle.load.foreign, idle.load.tokens) == (0, 0)
        # What says nothing has none, and what says too much isn't read to its end.
        for nothing in (None, "", METRICS + "# \n" * 500_000, "vllm:num_requests_waiting many"):
            told[0] = nothing
            await until(lambda: busy.load.foreign == 0)
            told[0] = METRICS
            await until(lambda: busy.load.foreign == 19)
        busy.load.end(1.0)


@pytest.mark.parametrize("options", [{}, {"reads_queues": True, "routing": "round_robin"}])
async def test_load_is_read_only_where_it_counts(engines, monkeypatch, options) -> None:
    monkeypatch.setattr("server.engine.routing.members._READ_EVERY_S", 0.01)
    reads = []

    async def metrics(http: web.Request) -> web.StreamResponse:
        reads.append(http)
        return web.Response(text=METRICS)

    one, two = engines[:2]
    one.metrics = two.metrics = metrics
    for urls, more in (([one.url, two.url], options), ([one.url], {"reads_queues": True})):
        async with watched(*urls, **more) as upstreams:
            await until(partial(getattr, upstreams, "ready"))
            for _ in range(20):
                async with upstreams.request("POST", CHAT, data=b"{}", headers={}) as reply:
                    await reply.read()
    assert reads == []


async def test_another_than_the_first_need_not_know_a_beginning(engines: list[Upstream]) -> None:
    one, two, _ = engines
    names = ModelNames({"m": of_vllm("m")})

    def asked(number: int) -> ParsedRequest:
        system = {"role": "system", "content": "You answer in short sentences. " * 100}
        messages = [system, {"role": "user", "content": f"question {number}"}]
        sent = orjson.dumps({"model": "m", "messages": messages})
        return parse_request(CHAT, sent, open_tenant(""), names)

    async with watched(one.url, two.url) as upstreams:
        await until(lambda: all(each.ready for each in upstreams.all))

        async def send(number: int) -> tuple[int | None, float]:
            request = asked(number)
            async with upstreams.request(
                "POST", CHAT, data=request.body, headers={}, repeatable=True, asked=request
            ) as reply:
                tokens = sum(member.load.tokens for member in upstreams.members)
                await reply.read()
                # As estimated at first, but nothing is cached.
                counts = {"prompt_tokens": len(request.raw) // 4, "completion_tokens": 1}
                counts["prompt_tokens_details"] = {"cached_tokens": 0}
                upstreams.note_counts(reply, b'{"usage":%s}' % orjson.dumps(counts))
                return reply.url.port, tokens

        first, _ = await send(0)
        refusing = one if first == one.port else two
        refusing.handler = refuse
        _, known = await send(1)
        # More would be so many that one upstream alone could not take them.
        for number in range(2, 6):
            port, tokens = await send(number)
            assert port != first
        assert tokens == pytest.approx(known, rel=0.02)


async def refuse(_: web.Request) -> web.StreamResponse:
    return web.json_response({}, status=429)
