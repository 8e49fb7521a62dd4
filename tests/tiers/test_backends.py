"""The contract that every backend keeps, through aiocache's public calls."""

import asyncio
import os

import pytest
from aiocache.base import BaseCache

from tests.tiers.conftest import Remote
from tiers import MemoryCache, Tier
from tiers.backend import ByteCache


async def test_returns_what_was_set(cache: BaseCache) -> None:
    assert await cache.get("a") is None
    assert await cache.set("a", b"\x00\xff")
    assert await cache.get("a") == b"\x00\xff"
    assert await cache.exists("a")
    assert list(await cache.multi_get(["a", "b"])) == [b"\x00\xff", None]


async def test_replaces(cache: BaseCache) -> None:
    await cache.set("a", b"1")
    await cache.set("a", b"2")
    assert await cache.get("a") == b"2"


async def test_deletes_and_clears(cache: BaseCache) -> None:
    await cache.multi_set([("a", b"1"), ("b", b"2")])
    assert await cache.delete("a") == 1
    assert await cache.delete("a") == 0
    await cache.clear()
    assert await cache.get("b") is None


async def test_counts_what_it_holds(own: ByteCache) -> None:
    await own.set("a", b"1")
    await own.set("a", b"2")
    await own.set("b", b"1")
    assert own.usage.entries == 2
    await own.delete("a")
    assert own.usage.entries == 1
    await own.clear()
    assert own.usage.entries == 0


async def test_add_keeps_what_is_there(cache: BaseCache) -> None:
    await cache.add("a", b"1")
    with pytest.raises(ValueError, match="already exists"):
        await cache.add("a", b"2")
    assert await cache.get("a") == b"1"


async def test_counts(cache: BaseCache) -> None:
    assert await cache.increment("n", 2) == 2
    assert await cache.increment("n", 3) == 5
    await cache.set("a", b"x")
    with pytest.raises(TypeError):
        await cache.increment("a")


async def test_expires(own: ByteCache, clock) -> None:
    await own.set("a", b"1", ttl=10)
    clock.now += 9
    assert await own.get("a") == b"1"
    clock.now += 1
    assert await own.get("a") is None


async def test_expiry_can_be_changed(cache: BaseCache, clock) -> None:
    # Servers count by their own clocks.
    await cache.set("a", b"1", ttl=1000)
    assert await cache.expire("a", 10_000)
    clock.now += 5000
    assert await cache.get("a") == b"1"
    assert not await cache.expire("b", 100)


async def test_a_read_sees_a_write_that_is_not_yet_committed(own: ByteCache) -> None:
    writing = asyncio.ensure_future(own.set("a", b"1"))
    await asyncio.sleep(0)
    assert await own.get("a") == b"1"
    assert await writing


async def test_is_bounded(own: ByteCache) -> None:
    for number in range(600):
        await own.set(f"{number}", os.urandom(3000))
    assert own.usage.bytes <= 1024 * 1024
    assert own.usage.evictions > 0
    assert await own.get("599") is not None
    assert await own.get("0") is None


async def test_refuses_what_is_too_large_and_keeps_the_rest(own: ByteCache) -> None:
    await own.set("a", b"1")
    await own.set("b", b"1")
    assert not await own.set("b", bytes(2 * 1024 * 1024))
    assert await own.get("a") == b"1"
    assert await own.get("b") is None


async def test_refuses_to_be_switched_off_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCACHE_DISABLE", "1")
    with pytest.raises(RuntimeError, match="AIOCACHE_DISABLE"):
        MemoryCache(1000)


async def test_says_what_it_is(own: ByteCache) -> None:
    await own.opened()
    assert own.is_open
    assert own.max_bytes == 1024 * 1024
    assert own.queued_bytes == 0
    for key in ("b", "a"):
        assert await own.set(key, b"1")
    assert [list(own.keys_after()), sorted(key for _, key in own.ranked_keys())] == (
        [["a", "b"]] * 2 if own.is_ordered else [[]] * 2
    )
    assert (own.statistics() is None) is (own.path is None) is own.in_memory
    tier = Tier("own", own)
    assert (tier.local, tier.in_memory, tier.is_open) == (own, own.in_memory, True)


async def test_a_backend_of_others_is_always_open(clock) -> None:
    tier = Tier("far", Remote(clock, lambda: 0))
    await tier.opened()
    assert (tier.local, tier.in_memory, tier.is_open) == (None, False, True)
