"""What only the memory tier promises, with every policy: bounded, and it reports what it evicts."""

import gc
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.tiers.conftest import Clock
from tiers import MemoryCache, digest
from tiers.policies import LRU, POLICIES

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
        2000, policy="lru", on_evict=lambda key, value, expires_at: evicted.append(key), clock=clock
    )
    await cache.set("a", bytes(500), ttl=10)
    await cache.set("b", bytes(500), ttl=99)
    clock.now += 10
    await cache.set("c", bytes(500))
    await cache.set("d", bytes(500))
    assert evicted == ["b"]


@EVERY
async def test_takes_what_it_says(policy: str) -> None:
    entries, value_bytes = 3000, 300
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cache = MemoryCache(entries * (value_bytes + 600), policy=policy)
        for number in range(4 * entries):
            await cache.write(digest(b"%d" % number), bytes(value_bytes), 1e12 + number)
            cache.read(digest(b"%d" % (number // 2)))
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
