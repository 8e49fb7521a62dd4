"""Leases in Redis and Memcached: real servers, owners that die, and outages."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

import pytest
from aiocache.base import BaseCache

from tests.servers import SERVERS, StoreServer
from tests.waiting import HANGS_S
from tiers.shared.leases import SharedLeases


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory) -> Iterator[StoreServer]:
    made = SERVERS[request.param](tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


@pytest.fixture
async def connect(server: StoreServer) -> AsyncIterator[Callable[[], BaseCache]]:
    """Return what connects to the server, as another process would."""
    made: list[BaseCache] = []

    def connect() -> BaseCache:
        made.append(server.open())
        return made[-1]

    yield connect
    for cache in made:
        await cache.close()


@pytest.fixture
async def leases(connect) -> AsyncIterator[Callable[..., SharedLeases]]:
    async with AsyncExitStack() as stack:

        def make(**options) -> SharedLeases:
            # No deadline passes and no lease expires, unless that is what a test is about.
            made = SharedLeases(connect(), **{"deadline_s": HANGS_S, "ttl_s": 3600} | options)
            stack.push_async_callback(made.close)
            return made

        yield make


async def until_taken(leases: SharedLeases, key: str) -> None:
    async with asyncio.timeout(HANGS_S):
        while not await leases.take(key):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_one_has_it_until_it_has_released_it_as_often(leases, key: str) -> None:
    ours, theirs = leases(), leases()
    assert await ours.take(key)
    assert await ours.take(key)
    assert not await theirs.take(key)
    await ours.release(key)
    assert not await theirs.take(key)
    await ours.release(key)
    assert await theirs.take(key)
    assert not await ours.take(key)
    await theirs.release(key)


async def test_of_many_one_gets_it(leases, key: str) -> None:
    everybody = [leases() for _ in range(20)]
    assert sum(await asyncio.gather(*(each.take(key) for each in everybody))) == 1


async def test_expires_when_its_owner_has_gone(leases, key: str) -> None:
    brief, ours, theirs = leases(ttl_s=1), leases(), leases()
    assert await ours.take(key)
    assert await brief.take(f"{key} brief")
    await ours.close()
    await brief.close()
    assert not await theirs.take(key)
    await until_taken(theirs, f"{key} brief")


class Sleep:
    """A sleep that ends when the test says so."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.done = asyncio.Event()
        self.again = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.again.set()
        await self.done.wait()
        self.done.clear()

    async def renew(self) -> None:
        self.again.clear()
        self.done.set()
        await self.again.wait()


async def test_is_renewed_as_long_as_it_is_held(leases, connect, key: str) -> None:
    sleep, server = Sleep(), connect()
    ours, theirs = leases(sleep=sleep), leases()
    assert await ours.take(key)
    await server.expire(f"lease:{key}", 1)
    # It may expire while it is being renewed; then the next renewal takes it anew.
    for _ in range(2):
        await sleep.renew()
    # Were it not renewed, it would have gone before this.
    await server.add(key, b"", ttl=1)
    async with asyncio.timeout(HANGS_S):
        while await server.exists(key):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not await theirs.take(key)
    await server.delete(f"lease:{key}")
    await sleep.renew()
    assert not await theirs.take(key)
    await ours.release(key)
    assert await theirs.take(key)


async def test_what_is_another_ones_by_now_is_neither_renewed_nor_released(
    leases, connect, key: str
) -> None:
    sleep, server = Sleep(), connect()
    ours, theirs = leases(sleep=sleep), leases()
    assert await ours.take(key)
    await server.delete(f"lease:{key}")
    assert await theirs.take(key)
    await sleep.renew()
    await ours.release(key)
    assert not await ours.take(key)
    await theirs.release(key)
    assert await ours.take(key)


@pytest.mark.parametrize("fails", [StoreServer.kill, StoreServer.hang])
async def test_counts_as_taken_during_an_outage(
    server: StoreServer, leases, key: str, fails
) -> None:
    before, ours, theirs = leases(), leases(deadline_s=0.05), leases(deadline_s=0.05)
    assert await before.take(f"{key} before")
    assert await ours.take(f"{key} too")
    fails(server)
    try:
        assert await ours.take(key)
        assert await theirs.take(key)
        await ours.release(key)
        await ours.release(f"{key} too")
    finally:
        server.kill()
        server.start()
    again = leases()
    await until_taken(again, key)
    assert not await leases().take(key)
