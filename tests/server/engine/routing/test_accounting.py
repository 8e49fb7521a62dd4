"""However a request ends, its upstream has it no more: over real sockets, by chance."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from types import NoneType

import aiohttp
import pytest
from aiohttp import web

from server.config.models import Routing
from server.engine.routing.addresses import Addresses
from server.engine.routing.held import HeldRequests
from server.engine.routing.upstreams import Upstreams
from server.engine.turns import Turns
from server.engine.upstream import UnavailableError
from server.engine.upstream import Upstream as EngineServer
from tests.server.conftest import CHAT, ROLE, WHOLE, Upstream, body, stream
from tests.waiting import HANGS_S

ENDS = ("answers", "streams", "is cut", "breaks", "refuses", "fails", "is unknown")
REQUESTS = 300


def by_chance(chance: random.Random) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that ends each request in another way."""

    async def handle(http: web.Request) -> web.StreamResponse:
        if http.headers.get("Upgrade") == "websocket":
            socket = web.WebSocketResponse()
            await socket.prepare(http)
            async for message in socket:
                await socket.send_str(message.data)
            return socket
        await http.read()
        end = chance.choice(ENDS)
        if end == "breaks":
            assert http.transport is not None
            http.transport.close()
        if end == "streams":
            return await stream(http, *WHOLE)
        if end == "is cut":
            made = await stream(http, ROLE)
            assert http.transport is not None
            http.transport.close()
            return made
        status = {"refuses": 429, "fails": 503, "is unknown": 404}.get(end, 200)
        return web.json_response(body(), status=status)

    return handle


async def pieces() -> AsyncIterator[bytes]:
    yield b"{"
    yield b"}"


async def ask(upstreams: Upstreams, chance: random.Random) -> None:
    headers = {"X-Session-Id": str(chance.randrange(9))}
    with suppress(UnavailableError, aiohttp.ClientError, OSError):
        if chance.random() < 0.2:
            async with upstreams.websocket("/x", headers, (), max_bytes=99) as socket:
                await socket.send_str("hi")
                await socket.receive()
            return
        async with upstreams.request(
            chance.choice(["GET", "POST"]),
            CHAT,
            data=chance.choice([b"{}", pieces()]),
            headers=headers,
            repeatable=chance.random() < 0.5,
            kept_id=chance.choice([None, None, "resp_1"]),
            demand=chance.choice(["none", "counted", "held"]),
        ) as reply:
            await reply.read()


async def give_up(asking: asyncio.Task[None], chance: random.Random) -> None:
    for _ in range(chance.randrange(60)):
        await asyncio.sleep(0)
    asking.cancel()


@pytest.mark.parametrize("routing", ["prefix", "round_robin"])
async def test_nothing_is_left_under_way(routing: Routing) -> None:
    chance = random.Random(7)
    async with Upstream() as one, Upstream() as two, Upstream() as three:
        for each in (one, two, three):
            each.handler = by_chance(chance)
        # At the last nobody listens.
        urls = [one.url, two.url, three.url, "http://127.0.0.1:1"]
        upstreams = Upstreams(
            Addresses(urls),
            lambda address: EngineServer(address.url, timeout_s=60),
            max_requests=16,
            turns=Turns(),
            routing=routing,
            held=HeldRequests(3600, 8),
        )
        members = upstreams.members

        tasks: list[asyncio.Task[None]] = []
        for number in range(REQUESTS):
            for member in upstreams.members:
                # At times there is none.
                member.upstream.ready = number % 20 < 15
            if number % 50 == 49:
                # One leaves, and comes back.
                upstreams.replace(chance.sample(urls, 3))
                upstreams.replace(urls)
            tasks.append(asyncio.create_task(ask(upstreams, chance)))
            if chance.random() < 0.4:
                tasks.append(asyncio.create_task(give_up(tasks[-1], chance)))
            await asyncio.sleep(0)
        assert upstreams.held.found_none > 0
        upstreams.held.end()
        async with asyncio.timeout(HANGS_S):
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {*map(type, ended)} == {NoneType, asyncio.CancelledError}
        assert (upstreams.in_flight, upstreams.held.waiting) == (0, 0)
        for member in {*members, *upstreams.members}:
            assert (member.load.active, member.load.tokens) == (0, 0.0)
        assert sum(member.load.counts.requests for member in upstreams.members) > 0
        await upstreams.close()
