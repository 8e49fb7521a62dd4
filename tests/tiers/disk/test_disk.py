"""What only the disk tier promises: it survives, is bounded, and evicts by worth."""

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import lmdb
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.conftest import Clock
from tests.waiting import HANGS_S
from tiers import DiskCache
from tiers.disk import Durability, compact, verify_in_use
from tiers.disk.file import DATA, DiskFile
from tiers.disk.record_format import unpack_blob
from tiers.disk.recovery import Recovery
from tiers.disk.transaction import Change
from tiers.disk.verify import verify

MIB = 1024 * 1024
LONG = os.environ.get("TIERSERVE_LONG") == "1"


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[DiskCache]]]:
    async with AsyncExitStack() as stack:

        async def make(max_bytes: int = MIB, durability=Durability.OS, **options) -> DiskCache:
            cache = DiskCache(tmp_path, max_bytes, durability=durability, **options)
            stack.push_async_callback(cache.close)
            await cache.opened()
            return cache

        yield make


def answer(number: int) -> bytes:
    """Return an answer of about 1 KiB as an engine gives it."""
    content = " ".join(f"word{number * step % 997}" for step in range(1, 120))
    message = {"role": "assistant", "content": content}
    return orjson.dumps({"object": "chat.completion", "choices": [{"message": message}]})


async def test_survives_closing(opened) -> None:
    cache = await opened()
    await cache.set("a", b"1")
    await cache.set("gone", b"1")
    await cache.delete("gone")
    await cache.close()
    again = await opened()
    assert await again.multi_get(["a", "gone"]) == [b"1", None]
    assert again.usage.entries == 1


@pytest.mark.parametrize("durability", Durability)
async def test_keeps_what_it_is_given_whatever_the_durability(opened, durability) -> None:
    cache = await opened(durability=durability)
    await asyncio.gather(*(cache.set(f"{number}", answer(number)) for number in range(20)))
    await cache.close()
    again = await opened()
    assert [again.read(f"{n}") for n in range(20)] == [answer(n) for n in range(20)]


async def test_interval_answers_before_the_commit_and_commits_once(opened, monkeypatch) -> None:
    commits, write = [], DiskFile.write

    def counted(self, changes, read):
        # An idle writer commits nothing now and then.
        commits.extend([len(changes)] if changes else [])
        return write(self, changes, read)

    monkeypatch.setattr(DiskFile, "write", counted)
    cache = await opened(durability=Durability.INTERVAL, interval_s=3600)
    for number in range(50):
        assert await cache.set(f"{number}", b"1")
    assert cache.usage.entries == 0
    await cache.close()
    assert sum(commits) == 50
    assert len(commits) <= 2


async def test_those_who_store_at_the_same_time_share_a_commit(opened, monkeypatch) -> None:
    commits, pauses, write = [], [], DiskFile.write
    queued = threading.Event()
    queued.set()

    def counted(self, changes, read):
        queued.wait(HANGS_S)
        commits.extend([len(changes)] if changes else [])
        return write(self, changes, read)

    monkeypatch.setattr(DiskFile, "write", counted)
    monkeypatch.setattr(
        "tiers.disk.writer.time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
    )
    cache = await opened()
    for number in range(3):
        await cache.set(f"alone{number}", b"1")
    assert commits == [1, 1, 1]
    assert pauses == []
    queued.clear()
    together = [asyncio.create_task(cache.set(f"{number}", b"1")) for number in range(20)]
    await asyncio.sleep(0)
    queued.set()
    assert all(await asyncio.gather(*together))
    assert sum(commits) == 23
    assert len(commits) <= 5
    # The thread pauses only after it has told who waited, so let it end.
    await cache.close()
    assert pauses


@pytest.mark.parametrize(
    ("durability", "sync"),
    [(Durability.COMMIT, True), (Durability.INTERVAL, True), (Durability.OS, False)],
)
async def test_lmdb_syncs_as_promised(opened, durability, sync) -> None:
    cache = await opened(durability=durability)
    assert cache._file.env.flags()["sync"] is sync


async def test_the_file_stays_within_its_limit(opened, tmp_path: Path) -> None:
    cache = await opened()
    for number in range(2000):
        await cache.set(f"{number}", os.urandom(number % 9000))
    assert cache.usage.evictions > 1000
    await cache.close()
    assert (tmp_path / "data.mdb").stat().st_size <= MIB
    assert verify(tmp_path).damaged == 0


async def test_a_smaller_limit_shrinks_the_file(opened, tmp_path: Path) -> None:
    cache = await opened(8 * MIB)
    await asyncio.gather(*(cache.set(f"{n}", os.urandom(5000)) for n in range(1000)))
    await cache.close()
    assert (tmp_path / "data.mdb").stat().st_size > 4 * MIB
    again = await opened(2 * MIB)
    assert await again.get("999") is not None
    assert await again.get("0") is None
    assert await again.set("new", os.urandom(5000))
    assert (tmp_path / "data.mdb").stat().st_size <= 2 * MIB


async def store_many(cache: DiskCache, name: str, number: int) -> None:
    """Store answers of 8 kB."""
    keys = [f"{name} {each}" for each in range(number)]
    assert all(await asyncio.gather(*(cache.set(key, key.encode() * 800) for key in keys)))


async def test_a_limit_may_change_while_it_is_open(opened, tmp_path: Path) -> None:
    cache = await opened(8 * MIB)
    await store_many(cache, "first", 500)
    full = cache.usage.bytes
    assert full > 3 * MIB
    cache.resize(2 * MIB)
    async with asyncio.timeout(HANGS_S):
        while cache.usage.bytes > 2 * MIB:
            # What is stored meanwhile waits for a part of the eviction, not for all of it.
            assert await cache.set("meanwhile", b"1")
    assert cache.read("meanwhile") == b"1"
    assert cache.max_bytes == 2 * MIB
    grown = (tmp_path / DATA).stat().st_size
    await store_many(cache, "later", 300)
    assert cache.usage.bytes <= 2 * MIB
    assert (tmp_path / DATA).stat().st_size <= grown
    cache.resize(8 * MIB)
    await store_many(cache, "again", 600)
    assert cache.usage.bytes >= full
    await cache.close()
    again = await opened(2 * MIB)
    assert (tmp_path / DATA).stat().st_size <= 2 * MIB
    assert again.usage.entries
    with pytest.raises(ValueError, match="at least"):
        again.resize(1)


async def test_a_limit_that_changes_before_the_file_is_open(tmp_path, monkeypatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(Recovery, "try_open", lambda self: False)
    monkeypatch.setattr(Recovery, "wait", lambda self: go.wait() and None)
    cache = DiskCache(tmp_path, 2 * MIB, durability=Durability.OS)
    cache.resize(8 * MIB)
    go.set()
    await cache.opened()
    try:
        await store_many(cache, "first", 400)
        assert cache.usage.bytes > 2 * MIB
    finally:
        await cache.close()


async def test_what_is_worth_least_leaves_first(opened) -> None:
    cache = await opened(worth=lambda key, size: 100.0 if key.startswith("good") else 1.0)
    for number in range(20):
        await cache.set(f"good{number}", os.urandom(3000))
    for number in range(400):
        await cache.set(f"poor{number}", os.urandom(3000))
    assert all(await cache.multi_get([f"good{number}" for number in range(20)]))
    assert await cache.get("poor0") is None


async def test_what_is_worth_much_does_not_stay_for_ever(opened) -> None:
    cache = await opened(worth=lambda key, size: 5.0 if key == "once dear" else 1.0)
    await cache.set("once dear", os.urandom(3000))
    for number in range(3000):
        await cache.set(f"{number}", os.urandom(3000))
    assert await cache.get("once dear") is None


async def test_what_is_read_stays(opened) -> None:
    cache = await opened()
    for number in range(1000):
        await cache.set(f"{number}", os.urandom(3000))
        await cache.get("100")
    assert await cache.get("100") is not None
    assert await cache.get("101") is None


async def test_what_has_expired_leaves_before_anything_alive(opened, clock) -> None:
    cache = await opened(clock=clock)
    for number in range(60):
        await cache.set(f"alive{number}", os.urandom(3000), ttl=1000)
    for number in range(60):
        await cache.set(f"short{number}", os.urandom(3000), ttl=10)
    clock.now += 10
    for number in range(50):
        await cache.set(f"new{number}", os.urandom(3000), ttl=1000)
    assert cache.usage.expirations == 60
    assert cache.usage.evictions == 0
    assert cache.usage.entries == 110


async def test_a_clock_that_jumps_back_breaks_nothing(opened, clock) -> None:
    cache = await opened(clock=clock)
    await cache.set("a", b"1", ttl=10)
    clock.now -= 500_000
    for number in range(600):
        await cache.set(f"{number}", os.urandom(3000), ttl=10)
    assert await cache.get("599") is not None
    assert cache.usage.bytes <= MIB
    clock.now = -5.0
    await cache.set("before 1970", b"1", ttl=1)
    assert await cache.get("before 1970") == b"1"
    clock.now = 2_000_000.0
    await cache.set("b", b"1")
    assert await cache.get("before 1970") is None


async def test_gives_the_hottest_first(opened, clock) -> None:
    cache = await opened(worth=lambda key, size: float(key), clock=clock)
    for key in ("3", "1", "4", "15", "9"):
        await cache.set(key, key.encode(), ttl=10 if key == "4" else None)
    assert list(cache.hottest()) == [
        ("15", b"15", None),
        ("9", b"9", None),
        ("4", b"4", clock.now + 10),
        ("3", b"3", None),
        ("1", b"1", None),
    ]
    replaced = asyncio.create_task(cache.set("9", b"new"))
    await asyncio.sleep(0)
    assert [key for key, _, _ in cache.hottest()] == ["15", "4", "3", "1"]
    await replaced


@pytest.mark.parametrize("error", [lmdb.MapResizedError("resized"), lmdb.CorruptedError("bad")])
async def test_what_can_not_be_read_is_no_end(opened, monkeypatch, error) -> None:
    cache = await opened()
    await cache.set("a", b"1")
    await cache.save("sketch", b"1")

    def failing(*args: object) -> None:
        raise error

    for name in ("record_of", "load"):
        monkeypatch.setattr(DiskFile, name, failing)
    assert list(cache.hottest()) == []
    assert cache.load("sketch") is None
    assert await cache.get("a") == b"1"


async def test_the_hottest_can_be_read_while_the_file_changes(opened) -> None:
    cache = await opened()
    for number in range(50):
        await cache.set(f"{number}", b"1")
    seen = []
    for key, _, _ in cache.hottest():
        seen.append(key)
        await cache.delete(key)
    assert seen == [f"{number}" for number in reversed(range(50))]


async def test_keeps_blobs(opened) -> None:
    cache = await opened()
    assert cache.load("sketch") is None
    assert await cache.save("sketch", b"\x00" * 1000)
    assert await cache.save("sketch", b"\x01" * 1000)
    await cache.close()
    again = await opened()
    assert again.load("sketch") == b"\x01" * 1000
    assert list(again.keys()) == []


async def test_compresses_with_a_dictionary_of_its_own(opened) -> None:
    cache = await opened(8 * MIB, compresses=True)
    for start in range(0, 800, 100):
        await asyncio.gather(*(cache.set(f"{n}", answer(n)) for n in range(start, start + 100)))
    assert cache._file._codec.has_dictionary
    assert cache.usage.bytes < 800 * len(answer(1)) * 0.75
    await cache.close()
    again = await opened(8 * MIB)
    assert [again.read(f"{n}") for n in range(800)] == [answer(n) for n in range(800)]


async def test_a_damaged_dictionary_makes_misses_and_is_no_end(opened, tmp_path: Path) -> None:
    cache = await opened(compresses=True)
    await asyncio.gather(*(cache.set(f"{n}", answer(n)) for n in range(500)))
    await cache.set("late", answer(1))
    with cache._file.env.begin(db=cache._file.dbs.meta, buffers=True) as txn:
        dictionary = unpack_blob(b"dictionary", txn.get(b"dictionary"))
    await cache.close()
    file = tmp_path / "data.mdb"
    where = file.read_bytes().index(dictionary[5000:5100])
    with file.open("r+b") as data:
        data.seek(where)
        data.write(b"\x00" * 10)
    again = await opened()
    assert again.usage.damaged > 0
    assert await again.get("late") is None
    assert await again.set("late", answer(1))
    assert await again.get("late") == answer(1)


async def test_tells_its_numbers(opened) -> None:
    cache = await opened()
    for number in range(200):
        await cache.set(f"{number}", os.urandom(3000))
    await cache.clear()
    found = cache.statistics()
    assert found is not None
    assert found.entries == 0
    assert 0 < found.used_bytes < found.free_bytes <= found.file_bytes <= found.map_bytes == MIB
    assert found.readers >= 1


async def test_compaction_gives_back_what_is_free(opened, tmp_path: Path) -> None:
    cache = await opened()
    for number in range(150):
        await cache.set(f"{number}", os.urandom(3000))
    for number in range(1, 150):
        await cache.delete(f"{number}")
    with pytest.raises(OSError, match="another process has the disk tier open"):
        compact(tmp_path)
    await cache.close()
    before, after = compact(tmp_path)
    assert after < before / 5
    assert (tmp_path / "data.mdb").stat().st_mode & 0o077 == 0
    again = DiskCache(tmp_path, MIB)
    assert again.read("0") is not None
    await again.close()


async def test_the_writer_survives_whatever_a_batch_raises(opened, monkeypatch, caplog) -> None:
    cache, failing = await opened(), True

    def worth(key: str, size: int) -> float:
        if failing:
            raise ZeroDivisionError
        return 1.0

    cache._file._worth = worth
    for _ in range(3):
        assert not await cache.set("a", b"1")
    assert cache.usage.refused == 3
    assert await cache.get("a") is None
    failing = False
    assert await cache.set("a", b"1")
    assert await cache.get("a") == b"1"
    message = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    unexpected = "the disk tier can't store, and tries again: ZeroDivisionError"
    assert message == [
        f"{unexpected}; 1 writes have failed so far",
        "the disk tier stores again; 3 writes failed",
    ]


def fail_once(monkeypatch: pytest.MonkeyPatch, error: lmdb.Error) -> None:
    """Let the next transaction that changes something fail."""
    transact, errors = DiskFile._transact, [error]

    def failing(self, changes, *args):
        if changes and errors:
            raise errors.pop()
        return transact(self, changes, *args)

    monkeypatch.setattr(DiskFile, "_transact", failing)


@given(st.integers(0, 2**32), st.sampled_from(Durability), st.integers(0, 3))
@settings(max_examples=60)
async def test_a_lost_change_never_shows_what_it_was_to_replace(
    seed: int, durability: Durability, most_lost: int
) -> None:
    """Whenever the disk fails: what is read is the last that was written, or nothing."""
    chance, fails, transact = random.Random(seed), False, DiskFile._transact
    last: dict[str, bytes | None] = {}

    def failing(self, changes, *args):
        if fails and changes:
            raise lmdb.DiskError("full")
        return transact(self, changes, *args)

    def look() -> None:
        for key, value in last.items():
            assert cache.read(key) in (value, None)
        assert all(last[key] == value for key, value, _ in cache.hottest())

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskFile, "_transact", failing)
        patch.setattr("tiers.disk.cache._MAX_FAILED_WRITES", most_lost)
        patch.setattr("tiers.disk.writer._FIRST_DELAY_S", chance.choice([0, 1e-4]))
        cache = DiskCache(Path(folder), MIB, durability=durability, interval_s=0.001)
        for number in range(40):
            fails = chance.random() < 0.4
            key = chance.choice("abcd")
            try:
                last[key] = None if chance.random() < 0.2 else b"%d" % number
                done = await (cache.set(key, value) if (value := last[key]) else cache.delete(key))
            except OSError:
                done = False
            if not done and len(cache._failed_writes) >= most_lost:
                # Its caller knows, and there is no room to remember it.
                last[key] = cache.read(key)
            if chance.random() < 0.3:
                await cache.save("settled", b"")
            look()
        fails = False
        await cache.close()
        cache = DiskCache(Path(folder), MIB)
        look()
        await cache.close()


async def test_a_full_map_makes_room(opened, monkeypatch) -> None:
    cache = await opened()
    for number in range(300):
        await cache.set(f"{number}", os.urandom(2500))
    evicted, held = cache.usage.evictions, cache.usage.entries
    fail_once(monkeypatch, lmdb.MapFullError("full"))
    assert await cache.set("a", b"1")
    assert cache.usage.evictions - evicted > 5
    assert cache.usage.entries < held


async def test_the_shortest_wait_for_more_ends(opened, monkeypatch) -> None:
    monkeypatch.setattr(
        "tiers.disk.writer.time", SimpleNamespace(monotonic=lambda: 1.0, sleep=lambda _: None)
    )
    cache = await opened()
    cache._writer._interval_s = 1e-7
    async with asyncio.timeout(HANGS_S):
        for _ in range(3000):
            assert all(await asyncio.gather(*[cache.set(key, b"1") for key in "abc"]))


async def test_room_that_readers_keep_is_waited_for(opened, monkeypatch) -> None:
    """Also if one stands still for half a second meanwhile."""
    cache = await opened()
    transact, waits_s = DiskFile._transact, []

    def held(self, *args):
        if sum(waits_s) < 0.5:
            raise lmdb.MapFullError("full")
        return transact(self, *args)

    monkeypatch.setattr(DiskFile, "_transact", held)
    monkeypatch.setattr("tiers.disk.file.time.sleep", waits_s.append)
    assert await cache.set("a", b"1")
    assert await cache.get("a") == b"1"


def test_large_values_find_room_among_small_ones(tmp_path: Path) -> None:
    # A large value needs a run of pages, and those that are free are scattered among small values.
    file = DiskFile(tmp_path, 4 * MIB, sync=False, worth=lambda key, size: 1 / size)
    sizes, held = random.Random(0), []
    for number in range(2000):
        value = bytes(sizes.choice([500, 4000, 4000, 6500, 65_000, 69_000]))
        held.append(file.write([Change(str(number), value)], ()).used_bytes)
        assert file.get(str(number).encode()) == (value, inf)
    file.close()
    assert min(held[1000:]) > 2 * MIB


async def test_a_map_that_another_process_grew_is_adopted(opened, monkeypatch) -> None:
    cache = await opened()
    await cache.set("a", b"1")
    fail_once(monkeypatch, lmdb.MapResizedError("resized"))
    assert await cache.set("b", b"2")
    assert await cache.multi_get(["a", "b"]) == [b"1", b"2"]


async def test_opens_again_after_a_panic(opened, monkeypatch) -> None:
    cache = await opened()
    await cache.set("a", b"1")
    fail_once(monkeypatch, lmdb.PanicError("panic"))
    monkeypatch.setattr("tiers.disk.writer._FIRST_DELAY_S", 0.0)
    assert not await cache.set("b", b"2")
    assert await cache.set("b", b"2")
    assert await cache.multi_get(["a", "b"]) == [b"1", b"2"]


async def test_keys_that_lmdb_does_not_take_are_refused(opened) -> None:
    cache = await opened()
    for key in ("", "k" * 512):
        assert not await cache.set(key, b"1")
        assert await cache.get(key) is None
        assert await cache.delete(key) == 0
    assert await cache.set("k" * 511, b"1")
    assert cache.usage.refused == 2


async def test_a_second_cache_in_the_process_is_refused(opened, tmp_path: Path) -> None:
    cache = await opened()
    with pytest.raises(OSError, match="already open in this process"):
        DiskCache(tmp_path, MIB)
    assert await cache.set("a", b"1")


KEYS = st.sampled_from([f"key{number}" for number in range(40)])
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("set"),
            KEYS,
            st.sampled_from([0, 100, 3000, 40_000, 60_000]),
            st.sampled_from([None, 5, 50]),
        ),
        st.tuples(st.just("fill"), st.integers(0, 30)),
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("expire"), KEYS, st.integers(1, 50)),
        st.tuples(st.just("wait"), st.integers(-20, 20)),
        st.tuples(st.just("reopen")),
    ),
    min_size=60,
    max_size=150,
)


class Model:
    """A disk tier beside a plain dictionary of value and expiry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.sets = 0
        self.truth: dict[str, tuple[bytes, float | None]] = {}
        self.cache = self.opened()

    def opened(self) -> DiskCache:
        return DiskCache(
            self.folder,
            MIB,
            durability=Durability.OS,
            compresses=True,
            clock=self.clock,
            worth=by_size,
        )

    async def set(self, key: str, size: int, ttl: float | None) -> None:
        self.sets += 1
        value = random.Random(size).randbytes(size) + b"%d" % self.sets
        assert await self.cache.set(key, value, ttl=ttl)
        self.truth[key] = value, None if ttl is None else self.clock.now + ttl

    async def fill(self, start: int) -> None:
        for number in range(start, start + 10):
            await self.set(f"key{number}", 50_000, None)

    async def get(self, key: str) -> None:
        found, (value, expires_at) = self.cache.read(key), self.truth.get(key, (None, None))
        assert found in (None, value)
        assert found is None or expires_at is None or self.clock.now < expires_at

    async def delete(self, key: str) -> None:
        await self.cache.delete(key)
        self.truth.pop(key, None)

    async def expire(self, key: str, ttl: int) -> None:
        if await self.cache.expire(key, ttl):
            self.truth[key] = self.truth[key][0], self.clock.now + ttl

    async def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    async def reopen(self) -> None:
        await self.cache.close()
        self.cache = self.opened()

    def rows(self) -> list[int]:
        dbs = self.cache._file.dbs
        with self.cache._file.env.begin() as txn:
            return [txn.stat(db)["entries"] for db in (dbs.entries, dbs.rows, dbs.order)]


@given(STEPS)
@settings(max_examples=300 if LONG else 30)
async def test_never_answers_wrong_and_keeps_its_indexes(steps) -> None:
    with TemporaryDirectory() as folder:
        model = Model(Path(folder))
        for action, *of in steps:
            await getattr(model, action)(*of)
            assert model.cache.usage.bytes <= MIB
        assert model.rows() == [model.cache.usage.entries] * 3
        await model.cache.close()
        assert verify(Path(folder)).damaged == 0


def by_size(key: str, size: int) -> float:
    return 1000.0 / size


async def test_those_of_another_pid_namespace_wait_until_the_file_is_closed(
    opened, tmp_path: Path, monkeypatch, caplog
) -> None:
    first = await opened()
    await first.set("a", b"1")
    monkeypatch.setattr("tiers.disk.recovery._namespace", lambda: 1)
    second = DiskCache(tmp_path, MIB)
    by_hand = DiskCache(tmp_path, MIB, quarantines=False)
    with pytest.raises(OSError, match="processes that share a file should share a PID namespace"):
        await by_hand.opened()
    await by_hand.close()
    assert (second.is_open, second.read("a")) == (False, None)
    for change in (second.set("a", b"2"), second.delete("a")):
        with pytest.raises(OSError, match="its file is open in another container"):
            await change
    await first.close()
    await second.opened()
    assert second.read("a") == b"1"
    assert caplog.text.count("the disk tier can't be used yet") == 1
    # Those of one namespace don't wait.
    assert await second.set("a", b"2")
    await second.close()


def test_who_has_died_elsewhere_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tiers.disk.recovery._namespace", iter([1, 2, 2]).__next__)
    first, second, third = (Recovery(tmp_path, MIB, Clock()) for _ in range(3))
    assert first.try_open()
    assert not second.try_open()
    assert second.waits_for_others
    (tmp_path / DATA).write_bytes(b"not closed cleanly")
    os.close(first._lock)
    assert not second.try_open()
    assert not second.waits_for_others
    # Now it is alone, and has to verify.
    assert not third.try_open()
    assert not third.waits_for_others
    for each in (second, third):
        each.release(closed=False)


async def test_is_private(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new", MIB)
    await cache.close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    for file in (tmp_path / "new").glob("*.*"):
        assert file.stat().st_mode & 0o077 == 0


def test_refuses_a_limit_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        DiskCache(tmp_path, 1000)


async def test_keys_come_in_order_each_once_whatever_changes(opened) -> None:
    cache = await opened(max_bytes=8 * MIB)
    texts = sorted(f"{number}" for number in range(1000))
    await asyncio.gather(*(cache.set(key, b"v") for key in texts))
    walk = cache.keys_after()
    found = [next(walk)]
    for number, key in enumerate(walk):
        found.append(key)
        await cache.set(f"{number:04}", b"v")
        await cache.delete(found[-1])
    assert len(found) == len(set(found))
    assert set(texts) <= set(found)
    assert [key for key in found if key in texts] == texts
    assert list(cache.keys_after("9998")) == []


async def test_what_waits_to_be_committed_is_among_the_keys(opened) -> None:
    cache = await opened()
    await cache.set("first", b"v")
    writes = [asyncio.create_task(cache.write(key, b"w", None)) for key in ("second", "first")]
    await asyncio.sleep(0)
    assert cache.queued_bytes == len("secondwfirstw")
    assert sorted(cache.keys_after()) == ["first", "second"]
    assert cache.peek("second") == (b"w", None)
    assert await asyncio.gather(*writes) == [True, True]
    assert cache.queued_bytes == 0


async def test_a_file_in_use_is_checked(opened, tmp_path: Path) -> None:
    cache = await opened()
    await asyncio.gather(*(cache.set(f"{number}", b"text%d" % number * 9) for number in range(9)))
    assert await verify_in_use(tmp_path) == (9, 0, None)
    data = tmp_path / DATA
    # A page that a later commit has replaced may still hold it, too.
    damaged = data.read_bytes().replace(b"text7text7", b"TEXT7text7")
    with data.open("r+b") as file:
        file.write(damaged)
    assert await verify_in_use(tmp_path) == (9, 1, None)
    with pytest.raises(OSError, match="No such file"):
        await verify_in_use(tmp_path / "none")


async def test_a_file_that_was_removed_is_missed(opened, monkeypatch, caplog) -> None:
    cache = await opened()
    await cache.set("a", answer(1))
    (cache.path / DATA).unlink()
    monkeypatch.setattr("tiers.disk.writer._CHECKED_EVERY_S", 0.0)
    assert not await cache.write("b", answer(2), None)
    assert "somebody has removed its file" in caplog.text
    assert await cache.get("a") == answer(1)
    assert cache.statistics().file_bytes == 0
