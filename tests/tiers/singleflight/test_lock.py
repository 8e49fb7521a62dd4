"""Turns: who generates, who waits and for how long, on clocks that only tests move."""

import asyncio
from contextlib import AsyncExitStack
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest

from tests.tiers.conftest import JSON
from tiers import (
    Answer,
    Chain,
    DiskCache,
    FileLeases,
    FrequencySketch,
    Freshness,
    GenerationLock,
    MemoryCache,
    Tier,
)  # fmt: skip
from tiers.singleflight.lock import LockStats

OLD, NEW = Answer(JSON, b"{1}"), Answer(JSON, b"{2}")


class Waiting:
    """A clock that goes on while one sleeps, and then lets happen what is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.then: dict[int, object] = {}

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if (happens := self.then.get(len(self.slept))) is not None:
            await happens()
        await asyncio.sleep(0)


@pytest.fixture
def waiting() -> Waiting:
    return Waiting()


@pytest.fixture
async def processes(clock, waiting: Waiting, tmp_path: Path):
    """Two chains, of which the memory is their own and the disk tier is one, with their turns."""
    disk = DiskCache(tmp_path, 1 << 20, clock=clock)
    made = []
    for _ in range(2):
        tiers = [Tier("memory", MemoryCache(10_000, clock=clock)), Tier("disk", disk)]
        chain = Chain(tiers, frequency=FrequencySketch(1024), max_answer_bytes=1000, clock=clock)
        turns = GenerationLock(
            chain, [FileLeases(tmp_path)], wait_s=10, clock=waiting, sleep=waiting.sleep
        )
        made.append((chain, turns))
    yield made
    for _, turns in made:
        await turns.close()
    await disk.close()


async def test_the_first_generates_and_the_second_gets_what_it_stored(processes, waiting) -> None:
    (chain, turns), (_, others) = processes

    async with AsyncExitStack() as stack:
        assert await stack.enter_async_context(turns.acquire("k", 0, 0)) is None

        async def store() -> None:
            await chain.store("k", NEW, Freshness(60))
            await stack.aclose()

        waiting.then[9] = store
        async with others.acquire("k", 0, 0) as answer:
            assert answer == NEW
    assert others.stats == LockStats(answered=1)
    assert turns.stats == LockStats()


async def test_looks_again_once_it_has_the_turn(processes) -> None:
    (chain, _), (_, others) = processes
    await chain.store("k", NEW, Freshness(60))
    async with others.acquire("k", 0, 0) as answer:
        assert answer == NEW
    assert others.stats == LockStats()


async def test_takes_over_what_the_other_gave_up(processes, waiting) -> None:
    (_, turns), (_, others) = processes
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(turns.acquire("k", 0, 0))
        waiting.then[3] = stack.aclose
        async with others.acquire("k", 0, 0) as answer:
            assert answer is None
            # It is the lease's owner now.
            waiting.slept.clear()
            async with turns.acquire("k", 0, 0) as answer:
                assert answer is None
            assert len(waiting.slept) > 0
    assert others.stats == LockStats(took_over=1)
    assert turns.stats == LockStats(gave_up=1)


async def test_waits_longer_and_longer_and_not_beyond_the_bound(processes, waiting) -> None:
    (_, turns), (_, others) = processes
    async with turns.acquire("k", 0, 0), others.acquire("k", 0, 0) as answer:
        assert answer is None
        assert others.stats == LockStats(gave_up=1)
    *polls, last = waiting.slept
    assert sum(waiting.slept) == pytest.approx(10)
    assert polls[0] == 0.005
    assert max(polls) == 0.1
    assert all(one <= next_ for one, next_ in pairwise(polls))
    assert last <= 0.1


async def test_ends_waiting_when_cancelled_and_takes_nothing_along(processes, waiting) -> None:
    (_, turns), (_, others) = processes
    async with turns.acquire("k", 0, 0):
        task: asyncio.Task | None = None

        async def cancel() -> None:
            task.cancel()

        waiting.then[2] = cancel
        task = asyncio.create_task(others.acquire("k", 0, 0).__aenter__())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert others.stats == LockStats(aborted=1)
    async with turns.acquire("k", 0, 0):
        assert turns.stats == LockStats()


async def test_other_keys_are_other_turns(processes, waiting) -> None:
    (_, turns), (_, others) = processes
    async with turns.acquire("k", 0, 0), others.acquire("l", 0, 0) as answer:
        assert answer is None
    assert waiting.slept == []


@pytest.mark.parametrize("error", [OSError, asyncio.CancelledError])
async def test_a_failure_ends_the_turn(processes, waiting, error: type[BaseException]) -> None:
    (_, turns), (_, others) = processes
    with pytest.raises(error):
        async with turns.acquire("k", 0, 0):
            raise error
    async with others.acquire("k", 0, 0):
        assert waiting.slept == []


async def test_only_a_newer_answer_will_do_and_replaces_the_older(processes, clock) -> None:
    (chain, _), (other_chain, others) = processes
    for each in (chain, other_chain):
        await each.store("k", OLD, Freshness(60))
    stored_at = clock.now
    async with others.acquire("k", 0, stored_at) as answer:
        assert answer is None
    clock.now += 1
    await chain.store("k", NEW, Freshness(60))
    async with others.acquire("k", 0, inf) as answer:
        assert answer is None
    hit = await other_chain.lookup("k")
    assert (hit.tier, hit.entry.answer) == ("memory", OLD)
    async with others.acquire("k", 0, stored_at) as answer:
        assert answer == NEW
    hit = await other_chain.lookup("k")
    assert (hit.tier, hit.entry.answer) == ("memory", NEW)
    clock.now += 60
    async with others.acquire("k", 0, stored_at) as answer:
        assert answer is None


async def test_who_wants_a_new_answer_waits_for_nobody(processes, waiting) -> None:
    (_, turns), (_, others) = processes
    async with turns.acquire("k", 0, 0), others.acquire("k", 0, inf) as answer:
        assert answer is None
    assert waiting.slept == []


async def test_looking_counts_neither_as_asking_nor_as_a_hit(processes) -> None:
    (chain, _), (other_chain, others) = processes
    await chain.store("k", NEW, Freshness(60))
    before = [(tier.counts.hits, tier.counts.misses) for tier in other_chain.tiers]
    for _ in range(3):
        async with others.acquire("k", 0, 0):
            pass
    assert [(tier.counts.hits, tier.counts.misses) for tier in other_chain.tiers] == before
    await other_chain.lookup("k")
    # Asked for once, so it isn't promoted yet.
    assert (await other_chain.lookup("k")).tier == "disk"
