"""The shared tier's backends on real servers: times to live, refusals, and calls that are cut."""

import asyncio
import gc
import random
import warnings
from contextlib import suppress

import pytest
from aiomcache.exceptions import ClientException

from tests.servers import MemcachedServer, RedisServer
from tests.waiting import HANGS_S
from tiers.shared.memcached import MemcachedBytes

DAY_S = 24 * 3600
CONNECTIONS = 16


@pytest.mark.parametrize(
    ("ttl", "least_ms", "most_ms"),
    [(1e-9, -2, 1), (0.5, -2, 500), (100.25, 90_000, 100_250), (100 * 366 * DAY_S, 3e12, 3.2e12)],
)
async def test_redis_keeps_for_milliseconds(
    redis_server: RedisServer, ttl: float, least_ms: float, most_ms: float
) -> None:
    cache = redis_server.open()
    assert await cache.set("a", b"1", ttl=ttl)
    assert least_ms <= int(redis_server.ask("pttl tierserve:a")[1:]) <= most_ms
    await cache.close()


@pytest.mark.parametrize(
    ("ttl", "least_s", "most_s"),
    [
        (1e-9, 0, 1),
        (100.25, 90, 101),
        (30 * DAY_S, 30 * DAY_S - 10, 30 * DAY_S),
        # From here on it goes out as a Unix time.
        (30 * DAY_S + 0.5, 30 * DAY_S - 10, 30 * DAY_S + 10),
        (100 * 366 * DAY_S, DAY_S, 2**31),
    ],
)
async def test_memcached_keeps_for_seconds(
    memcached_server: MemcachedServer, ttl: float, least_s: float, most_s: float
) -> None:
    cache = memcached_server.open()
    assert await cache.set("a", b"1", ttl=ttl)
    reply = memcached_server.ask("mg tierserve:a t")
    # After its second it is gone.
    assert (reply == b"EN" and ttl < 1) or least_s <= int(reply[4:]) <= most_s
    await cache.close()


async def test_memcached_refuses_what_is_too_large(memcached_server: MemcachedServer) -> None:
    cache = memcached_server.open()
    await cache.set("a", b"1")
    await cache.set("b", b"1")
    assert not await cache.set("b", bytes(1024 * 1024))
    assert await cache.set("c", bytes(1000 * 1024))
    assert await cache.get("a") == b"1"
    assert await cache.get("b") is None
    await cache.close()


async def test_memcached_takes_keys_of_any_length(memcached_server: MemcachedServer) -> None:
    cache = memcached_server.open()
    longs = ["k" * 240, "k" * 241, "k" * 1000, "k" * 999 + "l"]
    for number, key in enumerate(longs):
        assert await cache.set(key, b"%d" % number)
    assert [await cache.get(key) for key in longs] == [b"0", b"1", b"2", b"3"]
    await cache.close()


async def test_a_full_redis_refuses(tmp_path) -> None:
    server = RedisServer(tmp_path)
    try:
        assert server.ask("config set maxmemory 1") == b"+OK"
        cache = server.open()
        assert not await cache.set("a", b"1", ttl=10)
        assert await cache.get("a") is None
        await cache.close()
    finally:
        server.kill()


async def test_clearing_redis_leaves_the_keys_of_others(redis_server: RedisServer) -> None:
    cache = redis_server.open()
    assert redis_server.ask("set theirs 1") == b"+OK"
    await cache.set("ours", b"1")
    await cache.clear()
    assert redis_server.ask("exists theirs") == b":1"
    assert await cache.get("ours") is None
    await cache.close()


async def test_calls_that_are_cut_never_mix_up_replies(server) -> None:
    """A reply that comes after its call's deadline must not be taken for the next call's."""
    cache = server.open()
    chance = random.Random(0)
    values = {f"{number}": b"%d" % number * (1 + number * 997 % 9000) for number in range(40)}
    for key, value in values.items():
        assert await cache.set(key, value)

    async def ask() -> None:
        for _ in range(30):
            key = chance.choice(list(values))
            call = asyncio.ensure_future(
                chance.choice([cache.get, cache.get, cache.exists])(key)
                if chance.random() < 0.8
                else cache.set(key, values[key])
            )
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                call.cancel()
            with suppress(asyncio.CancelledError):
                assert await call in (values[key], True)

    await asyncio.gather(*(ask() for _ in range(CONNECTIONS + 4)))
    for key, value in values.items():
        assert await cache.get(key) == value
    await cache.close()


async def test_a_call_that_is_cut_while_it_connects_leaves_no_connection(server) -> None:
    # What other tests have left is no concern of this one.
    gc.collect()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for turns in range(40):
            cache = server.open()
            call = asyncio.ensure_future(cache.get("a"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with suppress(asyncio.CancelledError):
                assert await call is None
            await cache.close()
            del cache, call
        await asyncio.sleep(0)
        gc.collect()
    assert [str(each.message) for each in warned] == []


async def test_hanging_and_dying_end_calls_and_leave_no_connection_lost(server) -> None:
    cache = server.open()
    await cache.set("a", b"1")
    server.hang()
    for _ in range(2):
        calls = [cache.get("a", timeout=0.05) for _ in range(2 * CONNECTIONS)]
        got = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, TimeoutError) for each in got)
    server.go_on()
    assert await cache.get("a") == b"1"
    calls = [cache.set("b", bytes(100_000)) for _ in range(CONNECTIONS)]
    server.hang()
    dying = asyncio.gather(*calls, return_exceptions=True)
    await asyncio.sleep(0)
    server.kill()
    async with asyncio.timeout(HANGS_S):
        assert any(isinstance(each, Exception) for each in await dying)
    with pytest.raises(Exception, match=r"(?i)connect"):
        await cache.get("a")
    server.start()
    for _ in range(2):
        calls = [cache.set("b", b"2") for _ in range(2 * CONNECTIONS)]
        assert all(await asyncio.gather(*calls))
    await cache.close()


async def test_connections_are_bounded(server) -> None:
    cache = server.open()
    assert await asyncio.gather(*(cache.get(f"{n}") for n in range(200))) == [None] * 200
    is_memcached = isinstance(server, MemcachedServer)
    if is_memcached:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"stats\r\n")
        stats = (await reader.readuntil(b"END\r\n")).decode()
        writer.close()
        open_now = int(stats.split("STAT curr_connections ")[1].split()[0])
        # Its own, and those of this question.
        assert open_now <= CONNECTIONS + 3
    else:
        stats = await cache.client.info("clients")
        assert stats["connected_clients"] <= CONNECTIONS
    await cache.close()


async def test_memcached_that_closes_in_the_middle_is_a_failure() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
        cache = MemcachedBytes("127.0.0.1", server.sockets[0].getsockname()[1])
        calls = [cache.get("a"), cache.delete("a"), cache.exists("a"), cache.set("a", b"1")]
        for call in calls:
            with pytest.raises((EOFError, ConnectionError, ClientException)):
                await call
        await cache.close()
