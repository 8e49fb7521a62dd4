"""The shared tier's backends on real servers: times to live, refusals, and calls that are cut."""

import asyncio
import gc
import random
import time
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
    ("ttl", "kept_ms"),
    [(1e-9, 1), (0.5, 500), (10_000.25, 10_000_250), (100 * 366 * DAY_S, 100 * 366 * DAY_S * 1000)],
)
async def test_redis_keeps_for_milliseconds(
    redis_server: RedisServer, ttl: float, kept_ms: int
) -> None:
    cache, began_at = redis_server.open(), time.monotonic()
    assert await cache.set("a", b"1", ttl=ttl)
    left_ms = int(redis_server.ask("pttl tierserve:a")[1:])
    least_ms = kept_ms - (time.monotonic() - began_at) * 1000 - 2
    # -2 says that it has gone.
    assert max(least_ms, 0) <= left_ms <= kept_ms or (left_ms == -2 and least_ms <= 0)
    await cache.close()


@pytest.mark.parametrize(
    ("ttl", "kept_s"),
    [
        (1e-9, 1),
        (10_000.25, 10_001),
        (30 * DAY_S, 30 * DAY_S),
        # From here on it goes out as a Unix time, of which there is a last one.
        (30 * DAY_S + 0.5, 30 * DAY_S + 1),
        (100 * 366 * DAY_S, 100 * 366 * DAY_S),
    ],
)
async def test_memcached_keeps_for_seconds(
    memcached_server: MemcachedServer, ttl: float, kept_s: float
) -> None:
    cache, began_at = memcached_server.open(), time.monotonic()
    kept_s = min(kept_s, 2**31 - 1 - time.time())
    assert await cache.set("a", b"1", ttl=ttl)
    reply = memcached_server.ask("mg tierserve:a t")
    # It counts whole seconds.
    least_s, most_s = kept_s - (time.monotonic() - began_at) - 2, kept_s + 2
    assert least_s <= 0 if reply == b"EN" else least_s <= int(reply[4:]) <= most_s
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
    with warnings.catch_warnings():
        # What other tests have left is no concern of this one.
        warnings.simplefilter("ignore")
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
