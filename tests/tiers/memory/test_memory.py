"""What only the memory tier promises, with every policy: bounded, and it reports what it evicts."""

import asyncio
import errno
import gc
import mmap
import tracemalloc
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.tiers.conftest import JSON, Clock
from tiers import Answer, Entry, MemoryCache, digest
from tiers.policies import ARC, LRU, POLICIES

MAX_BYTES = 8000
EVERY = pytest.mark.parametrize("policy", POLICIES)
KEYS = st.sampled_from("abcdefghijkl")


def run(coroutine):
    """Run a coroutine that never waits, as those of the memory tier don't."""
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    return stopped.value.value


class AgainstDictionary(RuleBasedStateMachine):
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.truth: dict[str, tuple[bytes, float | None]] = {}
        self.evicted: list[str] = []
        self.cache = MemoryCache(
            MAX_BYTES, policy=self.policy, on_evict=self.note, clock=self.clock
        )

    def note(self, key: str, value: bytes, expires_at: float | None) -> None:
        assert key not in list(self.cache.keys())
        assert self.truth.pop(key) == (value, expires_at)
        self.evicted.append(key)

    @rule(key=KEYS, size=st.integers(0, MAX_BYTES), ttl=st.none() | st.integers(1, 20))
    def store(self, key: str, size: int, ttl: int | None) -> None:
        value = key.encode() * size
        expires_at = None if ttl is None else self.clock.now + ttl
        self.truth[key] = (value, expires_at)
        before = self.cache.usage.refused
        stored = run(self.cache.write(key, value, expires_at))
        if self.cache.usage.refused > before:
            del self.truth[key]
        assert stored == (key in self.truth)

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        value, expires_at = self.truth.get(key, (None, None))
        if expires_at is not None and expires_at <= self.clock.now:
            del self.truth[key]
            value = None
        assert self.cache.read(key) == value

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        assert run(self.cache.remove(key)) == (self.truth.pop(key, None) is not None)

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds
        # What has expired may leave unannounced.
        for key, (_, expires_at) in list(self.truth.items()):
            if expires_at is not None and expires_at <= self.clock.now:
                assert self.cache.read(key) is None
                del self.truth[key]

    @invariant()
    def is_bounded_and_complete(self) -> None:
        usage = self.cache.usage
        assert usage.bytes <= MAX_BYTES
        assert set(self.cache.keys()) == set(self.truth)
        assert usage.entries == len(self.truth)
        assert usage.evictions == len(self.evicted)
        overhead = self.cache.overhead_bytes
        assert usage.bytes == sum(len(value) + overhead for value, _ in self.truth.values())
        assert (self.cache.policy.victim() is None) == (not self.truth)


@EVERY
def test_never_answers_wrong_never_grows_and_tells_what_it_evicts(policy: str) -> None:
    machine = type("WithPolicy", (AgainstDictionary,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=50))


async def test_what_expired_is_not_told(clock: Clock) -> None:
    evicted: list[str] = []
    cache = MemoryCache(
        3000, policy="lru", on_evict=lambda key, value, expires_at: evicted.append(key), clock=clock
    )
    await cache.set("a", bytes(500), ttl=10)
    await cache.set("b", bytes(500), ttl=99)
    clock.now += 10
    await cache.set("c", bytes(500))
    await cache.set("d", bytes(500))
    assert evicted == ["b"]


@EVERY
async def test_takes_what_it_says(policy: str) -> None:
    entries, content_bytes = 3000, 300
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cache = MemoryCache(entries * (content_bytes + 1000), policy=policy)
        for number in range(4 * entries):
            answer = Answer(JSON, bytes(content_bytes))
            entry = Entry(answer, number + 0.5, 1e12 + number, 1.5, packed_labels=b"model:m")
            await cache.write(digest(b"%d" % number), entry.encode(), entry.expires_at)
            cache.read_entry(digest(b"%d" % (number // 2)))
        # What is asked for is kept decoded.
        for key in [*cache.keys()]:
            cache.peek_entry(key, 0)
        del answer, entry
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= 1.1 * cache.usage.bytes


async def test_takes_a_policy_that_fits() -> None:
    policy = LRU(2000)
    cache = MemoryCache(2000, policy=policy)
    await cache.set("a", b"1")
    assert policy.victim() == "a"
    with pytest.raises(ValueError, match="for at most 1000 bytes, not 2000"):
        MemoryCache(1000, policy=policy)
    with pytest.raises(ValueError, match=r"policy should be one of arc, .* not 'mru'"):
        MemoryCache(3000, policy="mru")


async def test_a_size_that_memory_does_not_allow_changes_nothing(monkeypatch) -> None:
    cache = MemoryCache(100_000, policy=ARC.NAME)
    await cache.write("a", bytes(100), None)
    before = vars(cache.policy) | vars(cache)
    monkeypatch.setattr(mmap, "mmap", Mock(side_effect=OSError(errno.ENOMEM, "no memory")))
    with pytest.raises(OSError, match="no memory"):
        cache.resize(200_000)
    assert vars(cache.policy) | vars(cache) == before


@EVERY
async def test_a_new_size_holds_at_once_and_never_keeps_the_loop(policy: str) -> None:
    evicted: list[str] = []
    cache = MemoryCache(8 * 1024**2, policy=policy, on_evict=lambda key, *_: evicted.append(key))
    for number in range(5_000):
        await cache.write(str(number), bytes(1000), None)
    held = cache.usage.bytes
    cache.resize(512 * 1024)
    assert cache.max_bytes == 512 * 1024 < cache.usage.bytes < held
    turns = 0
    while cache.usage.bytes > 512 * 1024:
        # What is stored meanwhile takes no more than its own room.
        before = len(evicted)
        await cache.write(f"new {turns}", bytes(1000), None)
        assert len(evicted) - before <= 2
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1
    assert len(evicted) == cache.usage.evictions == 5_000 + turns - cache.usage.entries
    assert sorted(cache.keys()) == sorted({*cache.keys()} - {*evicted})
    cache.resize(16 * 1024**2)
    before = len(evicted)
    for number in range(5_000):
        await cache.write(f"more {number}", bytes(1000), None)
    assert len(evicted) == before
