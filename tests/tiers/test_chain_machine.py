"""The whole chain against a plain dictionary: the last stored answer or a miss, and bounds hold."""

import asyncio
import os
import random
import shutil
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.tiers.conftest import JSON, Clock, Remote
from tests.waiting import HANGS_S
from tiers import (
    Answer,
    BackgroundWork,
    Chain,
    Demotion,
    DiskCache,
    FrequencySketch,
    Freshness,
    MemoryCache,
    Purges,
    State,
    Tier,
    Transfers,
    WritePolicy,
)  # fmt: skip
from tiers.disk import Durability
from tiers.disk.marks import CLEAN
from tiers.entry import SKEW_S
from tiers.policies import POLICIES
from tiers.shared.redis import RedisBytes

MIB = 1024 * 1024
MEMORY_BYTES = 16 * 1024
MACHINES = count()
LONG = os.environ.get("TIERSERVE_LONG") == "1"
KEYS = [f"key{number}" for number in range(8)]
# Those of a key, and those that some have.
LABELS = {key: ["model:m", "tag:odd" if int(key[3:]) % 2 else "tag:even"] for key in KEYS}
PURGED = ["all", "model:m", "tag:odd", "tag:even", "tag:none", *(f"key:{key}" for key in KEYS)]
SIZES = [0, 100, 3000, 7000, 20_000, 60_000]
# Redis counts by its own clock, which goes on while a machine stands still.
FRESHNESS = [
    Freshness(100_000), Freshness(500), Freshness(500, 500), Freshness(500, 0, 2000),
    Freshness(500, 2000, 1000),
]  # fmt: skip


def state_at(now: float, stored_at: float, freshness: Freshness) -> State:
    """Say again, in other words than `Entry`, what an answer may be used for."""
    ttl_s, revalidate_s, if_error_s = freshness
    late_s = now - stored_at - ttl_s
    if stored_at - now > SKEW_S:
        return State.EXPIRED
    if late_s < 0:
        return State.FRESH
    if late_s < revalidate_s:
        return State.STALE_WHILE_REVALIDATE
    return State.STALE_IF_ERROR if late_s < if_error_s else State.EXPIRED


class ChainMachine(RuleBasedStateMachine):
    url = ""
    """Of the server for the shared tier."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        write=st.sampled_from(WritePolicy),
        promote_after=st.integers(1, 3),
        durability=st.sampled_from([Durability.OS, Durability.INTERVAL]),
        shares=st.booleans(),
    )
    def begin(
        self,
        policy: str,
        write: WritePolicy,
        promote_after: int,
        durability: Durability,
        shares: bool,
    ) -> None:
        # What an earlier run has stored on the server must not be found.
        self.namespace = f"machine{next(MACHINES)}" if shares else None
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory()
        self.options = policy, write, promote_after, durability
        self.clock, self.numbers = Clock(), count()
        self.truth: dict[str, tuple[Answer, float, Freshness]] = {}
        self.expired: set[str] = set()
        """What had expired at some time; a clock set back doesn't bring it back for sure."""
        self.run(self.open(Path(self.folder.name) / "0"))

    def run(self, coroutine):
        return self.runner.run(coroutine)

    async def open(self, path: Path) -> None:
        policy, write, promote_after, durability = self.options
        frequency, transfers, clock = FrequencySketch(1024), Transfers(), self.clock
        self.path, self.transfers = path, transfers
        self.backend = DiskCache(
            path,
            MIB,
            durability=durability,
            interval_s=0.001,
            worth=lambda key, size: (1 + frequency.estimate(key)) / size,
            clock=clock,
        )
        self.disk = Tier("disk", self.backend)
        purges = Purges(self.backend, clock=clock, deadline_s=HANGS_S)
        self.demotion = Demotion(
            [self.disk], frequency, transfers, purges, max_bytes=30_000, clock=clock
        )
        self.memory = MemoryCache(
            MEMORY_BYTES, policy=policy, on_evict=self.demotion.offer, clock=clock
        )
        tiers = [Tier("memory", self.memory), self.disk]
        if self.namespace is not None:
            server = RedisBytes(self.url, namespace=self.namespace)
            tiers.append(Tier("shared", server, deadline_s=HANGS_S, shared=True, clock=clock))
        self.chain = Chain(
            tiers,
            frequency=frequency,
            max_answer_bytes=50_000,
            promote_after=promote_after,
            transfers=transfers,
            purges=purges,
            write=write,
            clock=clock,
        )
        self.movement = BackgroundWork(
            tiers, self.backend, frequency, self.demotion, purges, write=write, clock=clock
        )
        self.hits = self.misses = self.stores = 0
        await self.movement.start()
        await self.movement.restored.wait()
        self.refilled = tiers[0].counts.stores

    async def close(self) -> None:
        await self.movement.close()
        await self.chain.close()

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from(SIZES), how=st.sampled_from(FRESHNESS))
    def store(self, key: str, size: int, how: Freshness) -> None:
        answer = Answer(JSON, random.Random(size).randbytes(size) + b"%d" % next(self.numbers))
        origin = self.chain.provenance(LABELS.get(key, ()))
        if self.run(self.chain.store(key, answer, how, provenance=origin)):
            self.truth[key] = answer, self.clock.now, how
            self.expired.discard(key)
            self.stores += 1
        else:
            assert size > 50_000

    @rule(purged=st.sampled_from(PURGED), key=st.sampled_from(KEYS))
    def purge(self, purged: str, key: str) -> None:
        begun = self.chain.provenance(LABELS[key])
        self.run(self.chain.purge(purged))
        gone = [
            each for each in self.truth if purged in ("all", f"key:{each}", *LABELS.get(each, ()))
        ]
        for each in gone:
            del self.truth[each]
        if purged in ("all", f"key:{key}", *LABELS[key]):
            # What was being made meanwhile is of before.
            stored = self.chain.store(key, Answer(JSON, b""), FRESHNESS[0], provenance=begun)
            assert not self.run(stored)

    @rule(start=st.integers(0, 40))
    def fill(self, start: int) -> None:
        for number in range(start, start + 10):
            self.store(f"other{number}", 40_000, FRESHNESS[0])

    @rule(key=st.sampled_from(KEYS))
    def crowd_out(self, key: str) -> None:
        """Store `key` again, then fill memory with what is asked for more often, and look."""
        self.store(key, 3000, FRESHNESS[0])
        self.look_up([key])
        for number in range(6):
            crowd = f"crowd{number}"
            self.look_up([crowd] * 4)
            self.store(crowd, 3000, FRESHNESS[0])
            self.run(self.demotion.drain())
        self.look_up([key])

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), tries=st.booleans())
    def look_up(self, keys: list[str], tries: bool = True) -> None:
        for key in keys:
            seen = self.run(self.chain.peek(key))
            hit = self.chain.find_at_once(key, JSON, self.clock.now) if tries else None
            if hit is None:
                hit = self.run(self.chain.lookup(key))
            if hit is None:
                assert seen is None
                self.misses += 1
                continue
            assert seen == hit.entry
            self.hits += 1
            answer, stored_at, freshness = self.truth[key]
            state = state_at(self.clock.now, stored_at, freshness)
            assert hit.entry.answer == answer
            assert hit.state is state is not State.EXPIRED
            assert hit.refresh is (state is State.STALE_WHILE_REVALIDATE)

    @rule(seconds=st.sampled_from([1, 50, 100, 400, 500, 1000, 2000, -1, -700, -3000]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        for key, (_, *times) in self.truth.items():
            if state_at(self.clock.now, *times) is State.EXPIRED:
                self.expired.add(key)

    @rule()
    def let_movement_end(self) -> None:
        self.run(self.demotion.drain())
        self.run(self.chain.drain())
        self.run(self.demotion.drain())
        assert len(self.transfers) == 0

    @rule()
    def restart(self) -> None:
        self.run(self.close())
        self.run(self.open(self.path))
        if self.options[1] is WritePolicy.ON_INSERT:
            self.expect_all_on_disk()

    @rule()
    def kill(self) -> None:
        """Go on with what a kill at this moment would leave of the file."""
        self.run(self.demotion.drain())
        self.run(self.chain.drain())
        write, durability = self.options[1], self.options[3]
        if durability is Durability.INTERVAL:
            # Of its last interval nothing is promised, so let that be committed.
            self.run(self.backend.save("barrier", b""))
        left = self.path.with_name(f"{int(self.path.name) + 1}")
        shutil.copytree(self.path, left)
        self.run(self.close())
        stat = (left / "data.mdb").stat()
        # As if it had been verified, which takes another process and its time.
        (left / CLEAN).write_text(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}")
        self.run(self.open(left))
        if write is WritePolicy.ON_INSERT:
            self.expect_all_on_disk()

    def expect_all_on_disk(self) -> None:
        """Expect every answer on disk, unless so much was stored that the disk evicts."""
        if any(key.startswith("other") for key in self.truth):
            return
        for key in self.truth.keys() - self.expired:
            assert self.backend.holds(key)

    @invariant()
    def bounds_hold(self) -> None:
        assert self.memory.usage.bytes <= MEMORY_BYTES
        assert self.backend.usage.bytes <= MIB
        assert (self.path / "data.mdb").stat().st_size <= MIB
        held = sum(len(value) + self.memory.overhead_bytes for _, value, _ in self.memory.entries())
        assert held == self.memory.usage.bytes

    @invariant()
    def counts_add_up(self) -> None:
        memory, disk, *shared = (tier.counts for tier in self.chain.tiers)
        lookups = self.hits + self.misses
        assert all(counts.errors == 0 for counts in (memory, disk, *shared))
        assert memory.hits + memory.misses == lookups
        assert lookups - memory.hits <= disk.hits + disk.misses <= lookups
        assert self.hits <= memory.hits + disk.hits + sum(counts.hits for counts in shared)
        assert memory.demotions == 0
        assert memory.promotions + disk.promotions <= disk.hits + 2 * sum(
            counts.hits for counts in shared
        )
        for counts in shared:
            assert counts.stores == self.stores
            assert counts.promotions == counts.demotions == 0
        stored = memory.stores - memory.promotions - self.refilled
        on_disk = disk.stores - disk.demotions - disk.promotions
        if self.options[1] is WritePolicy.ON_INSERT:
            assert stored <= self.stores == on_disk
        else:
            assert stored + on_disk == self.stores

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.close())
            self.runner.close()
            self.folder.cleanup()


def test_finds_the_last_stored_answer_or_nothing(redis_server, monkeypatch) -> None:
    monkeypatch.setattr(ChainMachine, "url", redis_server.unix_url)
    # An idle writer commits now and then, but not while its file is copied.
    monkeypatch.setattr("tiers.disk.writer._IDLE_S", 3600.0)
    run_state_machine_as_test(
        ChainMachine,
        settings=settings(
            max_examples=200 if LONG else 15,
            stateful_step_count=60 if LONG else 40,
            suppress_health_check=list(HealthCheck),
        ),
    )


@given(st.integers(0, 2**32), st.sampled_from(WritePolicy), st.sampled_from(sorted(POLICIES)))
@settings(max_examples=2000 if LONG else 100)
async def test_nothing_older_comes_back_however_calls_interleave(seed, write, policy) -> None:
    chance, clock, numbers = random.Random(seed), Clock(), count(1)
    remote = Remote(clock, delay=lambda: chance.randrange(4))
    frequency, transfers = FrequencySketch(1024), Transfers()
    farther = Tier("remote", remote, shared=chance.random() < 0.5)
    purges = Purges(clock=clock)
    demotion = Demotion([farther], frequency, transfers, purges, max_bytes=5000, clock=clock)
    memory = MemoryCache(2500, policy=policy, on_evict=demotion.offer, clock=clock)
    chain = Chain(
        [Tier("memory", memory), farther],
        frequency=frequency,
        max_answer_bytes=10_000,
        promote_after=1,
        transfers=transfers,
        purges=purges,
        write=write,
        clock=clock,
    )
    begun = dict.fromkeys("abcde", 0)
    ended = dict.fromkeys("abcde", 0)

    async def store(key: str) -> None:
        number = begun[key] = next(numbers)
        answer = Answer(JSON, b"%d" % number, bytes(chance.choice([1, 300, 800])))
        origin = chain.provenance([f"tag:{key}"])
        await asyncio.sleep(0)
        await chain.store(key, answer, Freshness(60), provenance=origin)
        ended[key] = max(ended[key], number)

    async def purge(key: str) -> None:
        until = next(numbers)
        await chain.purge(chance.choice([f"tag:{key}", f"key:{key}"]))
        ended[key] = max(ended[key], until)

    async def look_up(key: str) -> None:
        least = ended[key]
        hit = await chain.lookup(key)
        assert hit is None or least <= int(hit.entry.answer.content) <= begun[key]

    async def come_and_go() -> None:
        for _ in range(30):
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            await chance.choice([store, store, look_up, look_up, look_up, look_up, purge])(
                chance.choice("abcde")
            )

    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(come_and_go())
    for key in begun:
        await look_up(key)
    await demotion.drain()
    assert len(transfers) == 0
    assert memory.usage.bytes <= 2500
