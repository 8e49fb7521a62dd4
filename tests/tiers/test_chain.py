"""The chain: nearest first, promotion, expiry, and a tier's failure is a miss."""

from pathlib import Path

from tiers import Answer, Chain, DiskCache, Form, MemoryCache, Tier
from tiers.backend import ByteCache

ANSWER = Answer(Form.BODY, b"{}")


def chain_of(clock, *backends: ByteCache, max_answer_bytes: int = 1000) -> Chain:
    tiers = [Tier(backend.NAME, backend) for backend in backends]
    return Chain(tiers, ttl_s=60, max_answer_bytes=max_answer_bytes, clock=clock)


async def test_finds_what_was_stored_nearest_first(clock, tmp_path: Path) -> None:
    chain = chain_of(
        clock, MemoryCache(10_000, clock=clock), DiskCache(tmp_path, 1 << 20, clock=clock)
    )
    assert await chain.lookup("k") is None
    assert await chain.store("k", ANSWER)
    hit = await chain.lookup("k")
    assert hit is not None
    assert (hit.tier, hit.entry.answer) == ("memory", ANSWER)
    await chain.close()


async def test_promotes_with_the_time_that_is_left(clock, tmp_path: Path) -> None:
    memory, disk = MemoryCache(10_000, clock=clock), DiskCache(tmp_path, 1 << 20, clock=clock)
    chain = chain_of(clock, memory, disk)
    await chain.store("k", ANSWER)
    await memory.clear()
    clock.now += 30
    tiers = [hit.tier for hit in (await chain.lookup("k"), await chain.lookup("k")) if hit]
    assert tiers == ["disk", "memory"]
    clock.now += 30
    assert await chain.lookup("k") is None
    await chain.close()


async def test_does_not_store_what_is_too_large(clock) -> None:
    chain = chain_of(clock, MemoryCache(10_000, clock=clock), max_answer_bytes=1)
    assert not await chain.store("k", ANSWER)
    assert await chain.lookup("k") is None


class Broken(MemoryCache):
    def read(self, key: str) -> bytes | None:
        raise OSError("no such disk")

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        raise OSError("no such disk")


async def test_a_failing_tier_is_a_miss(clock) -> None:
    chain = chain_of(clock, Broken(10_000, clock=clock), MemoryCache(10_000, clock=clock))
    assert await chain.store("k", ANSWER)
    hit = await chain.lookup("k")
    assert hit is not None
    assert hit.entry.answer == ANSWER
    assert chain.tiers[0].counts.errors == 3


async def test_foreign_bytes_are_a_miss(clock) -> None:
    memory = MemoryCache(10_000, clock=clock)
    chain = chain_of(clock, memory)
    await memory.set("k", b"written by somebody else")
    assert await chain.lookup("k") is None
