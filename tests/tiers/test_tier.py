"""A tier: its failures are misses, bounded, logged once, and never bring back something older."""

import asyncio
import logging
import random
import time
from math import inf, nan

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.conftest import JSON, Clock, Remote
from tests.waiting import HANGS_S
from tiers import (
    Answer,
    Chain,
    DiskCache,
    Entry,
    FrequencySketch,
    Freshness,
    MemoryCache,
    Tier,
)  # fmt: skip
from tiers.disk import Durability
from tiers.disk.file import DiskFile
from tiers.purges.purges import Purges
from tiers.resilience.circuit_breaker import FAILURES
from tiers.resilience.failed_writes import FailedWrites

TIMES = ("stored_at", "expires_at", "generation_s", "stale_while_revalidate_s", "stale_if_error_s")
# Nothing is purged.
PURGES = Purges()


def entry(content: bytes, stored_at: float) -> bytes:
    return Entry(Answer(JSON, content), stored_at, stored_at + 1000).encode()


class Far(Remote):
    """A backend elsewhere that fails or hangs on demand; `calls` counts what reaches it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, delay=lambda: 0)
        self.fails = self.hangs = False
        self.calls = 0

    async def _go(self, there) -> object:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise OSError("no route")
        return await super()._go(there)


def damaged() -> list[bytes]:
    whole = Entry(Answer(JSON, b"1"), 1_000_000.0, 1_000_060.0)
    odd = [whole._replace(packed_labels=b"tag:\xff")]
    for number in (nan, inf, -inf):
        odd += [whole._replace(**{field: number}) for field in TIMES]
    odd.append(whole._replace(expires_at=1.7e308, stale_if_error_s=1.7e308))
    return [each.encode() for each in odd]


async def content_of(tier: Tier, key: str) -> bytes | None:
    found = await tier.get(key, PURGES)
    return found and found.answer.content


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_an_outage_costs_a_few_calls_and_one_line(clock, caplog, how: str) -> None:
    caplog.set_level(logging.INFO)
    far = Far(clock)
    tier = Tier("far", far, deadline_s=0.001, clock=clock)
    assert await tier.put("k", entry(b"1", clock.now), 60)
    setattr(far, how, True)
    far.calls = 0
    assert tier.available
    for _ in range(20):
        assert await tier.get("k", PURGES) is None
    assert (far.calls, tier.counts.errors, tier.counts.misses) == (3, 3, 17)
    assert not tier.available
    assert not await tier.put("other", entry(b"1", clock.now), 60)
    assert await tier.holds("other")
    assert far.calls == 3
    setattr(far, how, False)
    await asyncio.wait_for(tier._breaker._recovery, HANGS_S)
    assert tier.available
    assert await content_of(tier, "k") == b"1"
    messages = [record.getMessage() for record in caplog.records if record.name == "tiers.tier"]
    assert len(messages) == 2
    assert "failed to read and is left out until it answers again" in messages[0]
    assert messages[1] == "the far tier answers again"
    await tier.close()


async def test_an_event_loop_that_is_late_is_no_outage(clock) -> None:
    """Each turn takes longer than the deadline, which is for what is elsewhere."""
    far = Remote(clock, delay=lambda: 1)
    tier = Tier("far", far, deadline_s=0.001, clock=clock)
    assert await tier.put("k", entry(b"1", clock.now), 60)

    async def hog() -> None:
        while True:
            time.sleep(0.003)
            await asyncio.sleep(0)

    hogging = asyncio.create_task(hog())
    for _ in range(FAILURES + 1):
        assert await content_of(tier, "k") == b"1"
    await tier._probe()
    hogging.cancel()
    assert tier.available
    assert tier.counts.errors == 0
    await tier.close()


async def test_many_calls_take_turns(clock) -> None:
    far = Remote(clock, delay=lambda: 2)
    tier = Tier("far", far, deadline_s=HANGS_S, clock=clock)
    await tier.put("k", entry(b"1", clock.now), 60)
    assert all(await asyncio.gather(*(tier.get("k", PURGES) for _ in range(100))))
    assert far.most_at_once == 8
    assert (tier.counts.hits, tier.counts.busy, tier.counts.errors) == (100, 0, 0)


async def test_waiting_in_vain_is_no_failure(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, deadline_s=0.01, clock=clock)
    far.hangs = True
    assert await asyncio.gather(*(tier.get("k", PURGES) for _ in range(20))) == [None] * 20
    assert (far.calls, tier.counts.errors, tier.counts.busy) == (8, 8, 12)
    await tier.close()


async def test_a_success_between_failures_keeps_the_breaker_closed(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    for far.fails in (True, True, False, True, True):
        await tier.get("k", PURGES)
    assert tier.available
    assert tier.counts.errors == 4


async def test_a_breaker_that_is_closed_leaves_no_task(clock) -> None:
    far = Far(clock)
    far.fails = True
    tier = Tier("far", far, clock=clock)
    for _ in range(3):
        await tier.get("k", PURGES)
    await tier.close()
    assert len(asyncio.all_tasks()) == 1


async def test_a_near_tier_logs_once_until_it_succeeds(clock, caplog) -> None:
    class Broken(MemoryCache):
        fails = True

        def read_entry(self, key: str) -> Entry | None:
            if self.fails:
                raise OSError("no such disk")
            return super().read_entry(key)

    tier = Tier("near", backend := Broken(10_000, clock=clock), clock=clock)
    for backend.fails in (True, True, False, True):
        await tier.get("k", PURGES)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["the near tier failed to read: no such disk"] * 2
    assert tier.counts.errors == 3
    assert tier.available


async def test_a_failure_of_one_kind_is_logged_once(clock, caplog) -> None:
    """Such as writing to a Redis that others may only read."""
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    for number in range(10):
        far.fails = True
        await tier.put(f"{number}", entry(b"1", clock.now), 60)
        far.fails = False
        await tier.get("k", PURGES)
    assert [record.getMessage() for record in caplog.records] == [
        "the far tier fails to write: OSError('no route')"
    ]
    assert tier.available


async def test_a_failing_tier_counts_as_holding_everything(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    assert not await tier.holds("k")
    far.fails = True
    assert await tier.holds("k")


async def test_a_failed_write_hides_what_is_older(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    await tier.put("k", entry(b"1", clock.now), 60)
    far.fails = True
    assert not await tier.put("k", entry(b"2", clock.now + 1), 60)
    far.fails = False
    assert await tier.get("k", PURGES) is None
    assert not await tier.holds("k")
    # Another server has stored a later one.
    await far.set("k", entry(b"3", clock.now + 2), ttl=60)
    assert await content_of(tier, "k") == b"3"


async def test_a_write_that_arrives_late_does_not_replace_a_later_one(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    far.fails = True
    await tier.put("k", entry(b"1", clock.now), 60)
    far.fails = False
    await tier.put("k", entry(b"2", clock.now + 1), 60)
    assert await content_of(tier, "k") == b"2"
    await far.set("k", entry(b"1", clock.now), ttl=60)
    assert await tier.get("k", PURGES) is None


async def test_a_failed_removal_hides_what_should_be_gone(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    await tier.put("k", entry(b"1", clock.now), 60)
    clock.now += 1
    far.fails = True
    await tier.remove("k")
    far.fails = False
    assert await tier.get("k", PURGES) is None
    await tier.put("k", entry(b"2", clock.now - 0.5), 60)
    assert await content_of(tier, "k") == b"2"


async def test_a_write_that_is_cancelled_may_have_been_lost(clock) -> None:
    far = Far(clock)
    tier = Tier("far", far, clock=clock)
    await tier.put("k", entry(b"1", clock.now), 60)
    far.hangs = True
    writing = asyncio.ensure_future(tier.put("k", entry(b"2", clock.now + 1), 60))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    far.hangs = False
    assert await tier.get("k", PURGES) is None


async def test_a_disk_that_could_not_store_does_not_show_what_it_held(
    clock, tmp_path, monkeypatch
) -> None:
    disk = DiskCache(tmp_path, 1 << 20, durability=Durability.OS, clock=clock)
    tier = Tier("disk", disk, clock=clock)
    for key in "ab":
        assert await tier.put(key, entry(b"1", clock.now), 60)
    clock.now += 1
    with monkeypatch.context() as failing:
        failing.setattr(DiskFile, "_transact", _fail)
        failing.setattr("tiers.disk.writer._FIRST_DELAY_S", 0.0)
        for _ in range(2):
            assert not await tier.put("a", entry(b"2", clock.now), 60)
        await tier.remove("b")
        assert tier.counts.errors == 1
    assert all(disk._file.holds(key) for key in (b"a", b"b"))
    assert [await tier.get(key, PURGES) for key in "ab"] == [None, None]
    assert [await tier.holds(key) for key in "ab"] == [False, False]
    assert await tier.put("a", entry(b"2", clock.now), 60)
    assert await content_of(tier, "a") == b"2"
    await tier.remove("b")
    assert await tier.get("b", PURGES) is None
    await tier.close()


@pytest.mark.parametrize("value", damaged())
async def test_what_a_server_elsewhere_has_damaged_is_a_miss(clock, value: bytes) -> None:
    far = Far(clock)
    chain = Chain(
        [Tier("far", far, clock=clock)],
        frequency=FrequencySketch(64),
        max_answer_bytes=99,
        clock=clock,
    )
    # Only then are labels read.
    await chain.purge("tag:other")
    await far.set("k", value, ttl=60)
    assert await chain.lookup("k") is None
    assert await chain.peek("k") is None
    assert await chain.store("k", Answer(JSON, b"2"), Freshness(60))
    assert await chain.lookup("k") is not None


async def test_what_waits_for_a_file_to_be_opened_hides_nothing(
    clock, tmp_path, may_verify
) -> None:
    before = DiskCache(tmp_path, 1 << 20, clock=clock)
    tier = Tier("disk", before, clock=clock)
    for key in "ab":
        assert await tier.put(key, entry(b"1", clock.now), 60)
    await tier.close()
    # As a kill leaves it.
    (tmp_path / "clean").unlink()
    clock.now += 1
    disk = DiskCache(tmp_path, 1 << 20, clock=clock)
    tier = Tier("disk", disk, clock=clock)
    tier._failed_writes = FailedWrites(2)
    for key in "bcdef":
        assert not await tier.put(key, entry(b"2", clock.now), 60)
    assert not disk.is_open
    assert tier._failed_writes.is_empty
    assert await content_of(tier, "b") == b"2"
    may_verify.set()
    await disk.opened()
    assert [await content_of(tier, key) for key in "abf"] == [b"1", b"2", b"2"]
    await tier.close()


def _fail(self, changes, *args) -> None:
    raise lmdb.DiskError("full")


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=100)
async def test_never_gives_out_what_is_older_than_the_last_stored(seed: int, known: int) -> None:
    chance, clock = random.Random(seed), Clock()
    backends = [Far(clock), Far(clock)]
    tiers = [Tier(str(number), backend, clock=clock) for number, backend in enumerate(backends)]
    for tier in tiers:
        tier._failed_writes = FailedWrites(known)
    chain = Chain(
        tiers, frequency=FrequencySketch(64), max_answer_bytes=99, promote_after=1, clock=clock
    )
    last: dict[str, int] = {}
    for number in range(60):
        clock.now += chance.choice([0, 1])
        for backend in backends:
            backend.fails = chance.random() < 0.3
        for tier in tiers:
            # Outages are short here, and each call is made.
            tier._breaker.succeeded()
        key = chance.choice("abcdef")
        if chance.random() < 0.5:
            clock.now += 0.01
            await chain.store(key, Answer(JSON, b"%d" % number), Freshness(1000))
            last[key] = number
        elif (hit := await chain.lookup(key)) is not None:
            assert int(hit.entry.answer.content) == last[key]
        await chain.drain()
    await chain.close()
