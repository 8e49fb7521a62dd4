"""Purges: the table's order, the file that processes share, and what becomes of damage."""

import asyncio
import fcntl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiers.conftest import JSON
from tests.waiting import HANGS_S
from tiers import (
    Answer,
    Chain,
    DiskCache,
    FrequencySketch,
    Freshness,
    MemoryCache,
    Provenance,
    PurgeError,
    Purges,
    Tier,
)  # fmt: skip
from tiers.disk.recovery import LOCK
from tiers.purges.table import ALL, MAX_BYTES, MAX_LABELS, PurgeTable, label
from tiers.singleflight.flight import Flight, SingleFlight

ANSWER = Answer(JSON, b"{}")
LABELS = ["all", "key:k", "model:m", "tenant:t", "tag:é", "tag:two words"]
tables = st.dictionaries(st.sampled_from(LABELS), st.integers(1, 20)).map(PurgeTable)


def packed(purge_epoch: int, *labels: str) -> tuple[int, bytes]:
    made = Provenance.of(purge_epoch, labels)
    return made.purge_epoch, made.packed_labels


@given(tables, tables, tables)
def test_merging_takes_the_higher_number_in_any_order(one, two, three) -> None:
    assert one.merged(two) == two.merged(one)
    assert one.merged(two).merged(three) == one.merged(two.merged(three))
    assert one.merged(one) == one
    assert one.merged(two).latest == max(one.latest, two.latest)
    for each in LABELS:
        for generation in range(21):
            entry = "k" if each == "key:k" else "other", *packed(generation, each)
            purged = one.purges(*entry) or two.purges(*entry)
            assert one.merged(two).purges(*entry) is purged


@given(tables)
def test_a_table_survives_packing_and_no_two_begin_alike(table) -> None:
    packed = table.pack()
    assert PurgeTable.unpack(packed) == table
    assert table.pack()[:13] != packed[:13]


@given(tables, st.data())
def test_a_table_that_is_cut_or_of_another_format_is_refused(table, data) -> None:
    packed = table.with_purge(1, "tag:last").pack()
    size = data.draw(st.integers(0, len(packed) - len("tag:last") - 2))
    with pytest.raises(ValueError, match=r"purges|argument|decode"):
        PurgeTable.unpack(packed[:size])
    with pytest.raises(ValueError, match="another format"):
        PurgeTable.unpack(b"\x63" + packed[1:])


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.integers(-(10**6), 10**6))))
def test_the_order_holds_however_the_clock_jumps(steps) -> None:
    """What was being made when its label was purged is purged, and nothing made later."""
    table, clock_us = PurgeTable(), 10**9
    made: list[tuple[str, int, bool]] = []
    for name, jump_us in steps:
        clock_us += jump_us
        made.append((name, table.latest, False))
        table = table.with_purge(clock_us, name)
        made = [(own, at, gone or name in (own, ALL)) for own, at, gone in made]
        made.append((name, table.latest, False))
        for own, generation, gone in made:
            key, labels = ("k", ()) if own == "key:k" else ("other", (own,))
            assert table.purges(key, *packed(generation, *labels)) is gone


def test_a_table_that_outgrows_its_bound_purges_everything_and_starts_anew() -> None:
    table = PurgeTable(max_bytes=1000)
    sizes = []
    for number in range(200):
        before = table
        table = table.with_purge(number, f"key:{number}")
        sizes.append(len(table.pack()))
        if len(table) < len(before):
            assert table.purges("other", *packed(before.latest))
            assert not table.purges("other", *packed(table.latest))
    assert max(sizes) <= 1013
    assert min(sizes[20:]) < 100
    assert len(PurgeTable({f"key:{n:064}": n + 1 for n in range(9_000)}).pack()) <= MAX_BYTES


def chain_of(disk: DiskCache, clock, **options) -> Chain:
    tiers = [Tier("memory", MemoryCache(100_000, clock=clock)), Tier("disk", disk)]
    return Chain(
        tiers,
        frequency=FrequencySketch(1024),
        max_answer_bytes=1000,
        purges=Purges(disk, clock=clock, **{"deadline_s": HANGS_S} | options),
        clock=clock,
    )


async def test_purges_by_key_model_tenant_tag_and_all(clock, tmp_path: Path) -> None:
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    labels = ["model:m", "tenant:t", "tag:a", "tag:b"]
    for purged in ["key:k", *labels, "all"]:
        for key, own in (("k", labels), ("other", ["model:n"])):
            assert await chain.store(key, ANSWER, Freshness(60), provenance=chain.provenance(own))
            assert await chain.lookup(key) is not None
        await chain.purge(purged)
        assert await chain.lookup("k") is None
        assert (await chain.lookup("other") is None) is (purged == "all")
    assert chain.purged == 6
    await chain.close()


async def test_many_labels_are_purged_in_one_step(clock, tmp_path: Path) -> None:
    disk, keys = DiskCache(tmp_path, 8 << 20, clock=clock), [f"k{n}" for n in range(MAX_LABELS)]
    chain = chain_of(disk, clock)
    for key in ("k0", "k999", "other"):
        await chain.store(key, ANSWER, Freshness(60))
    purged = asyncio.create_task(chain.purge(*(label("key", key) for key in keys)))
    await asyncio.sleep(0)
    # While it is under way, too.
    for _ in range(2):
        assert await chain.lookup("k0") is None
        assert await chain.lookup("k999") is None
        assert await chain.lookup("other") is not None
        await purged
    assert len(chain.purges.table) == MAX_LABELS
    assert chain.purged == 1
    for wrong in ([], [f"key:{n}" for n in range(MAX_LABELS + 1)]):
        with pytest.raises(ValueError, match="from 1 to 1000 labels, not "):
            await chain.purge(*wrong)
    with pytest.raises(ValueError, match="a label should be"):
        await chain.purge("key:other", "odd")
    assert await chain.lookup("other") is not None
    await chain.close()


async def test_what_was_being_made_when_it_was_purged_is_not_stored(clock, tmp_path: Path) -> None:
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    begun = chain.provenance(["model:m"])
    await chain.purge("model:m")
    assert not await chain.store("k", ANSWER, Freshness(60), provenance=begun)
    assert await chain.store("k", ANSWER, Freshness(60), provenance=chain.provenance(["model:m"]))
    assert await chain.lookup("k") is not None
    await chain.close()


@pytest.mark.parametrize("wrong", ["", "all:", ":red", "key", "key:", "colour:", "tag:a\nb", "m"])
async def test_says_what_a_label_should_be(clock, wrong: str) -> None:
    purges = Purges(clock=clock)
    with pytest.raises(ValueError, match="a label should be all, key:… or KIND:NAME"):
        await purges.purge(wrong)
    with pytest.raises(ValueError, match="without a line break"):
        purges.provenance(["a\nb"])


def test_a_label_is_printable_and_short() -> None:
    assert label("model", "a\n\x00b" + "c" * 500) == "model:ab" + "c" * 124
    assert label("tag", "é \ud800") == "tag:é "


async def test_a_key_of_any_length_is_purged_and_no_other(clock, tmp_path: Path) -> None:
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    purged, other = "k" * 511, "k" * 128
    for key in (purged, other):
        assert await chain.store(key, ANSWER, Freshness(60))
    await chain.purge(label("key", purged))
    assert await chain.lookup(purged) is None
    assert await chain.lookup(other) is not None
    with pytest.raises(ValueError, match="a key should have at most 511 bytes"):
        await chain.purge(label("key", "k" * 512))
    with pytest.raises(ValueError, match="in printable characters"):
        await chain.purge(label("key", "k\n"))
    await chain.close()


async def test_purges_outlive_a_restart_and_a_clock_set_back(clock, tmp_path: Path) -> None:
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    await chain.purge("model:n")
    await chain.store("k", ANSWER, Freshness(10**7), provenance=chain.provenance(["model:m"]))
    clock.now -= 900_000
    await chain.purge("model:m")
    await chain.close()
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    assert await chain.lookup("k") is None
    clock.now += 900_000
    assert await chain.lookup("k") is None
    await chain.close()


async def test_another_chain_on_the_file_sees_a_purge(clock, tmp_path: Path) -> None:
    """Two chains here; that two processes do is tested with processes."""
    passed_s = 0.0
    one = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    await one.store("k", ANSWER, Freshness(60), provenance=one.provenance(["model:m"]))
    two = Purges(one.purges._disk, clock=clock, monotonic=lambda: passed_s)
    entry = two.provenance(["model:m"])
    assert not two.is_purged("k", entry)
    await one.purge("model:m")
    passed_s = 0.019
    assert not two.is_purged("k", entry)
    passed_s = 0.021
    assert two.is_purged("k", entry)
    await one.close()


async def test_a_damaged_table_purges_everything_for_good(clock, tmp_path: Path, caplog) -> None:
    disk = DiskCache(tmp_path, 1 << 20, clock=clock)
    chain = chain_of(disk, clock)
    await chain.purge("tag:old")
    await chain.store("k", ANSWER, Freshness(60), provenance=chain.provenance())
    await disk.save("purges", b"not a table")
    await chain.close()
    for _ in range(2):
        chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
        assert await chain.lookup("k") is None
        assert await chain.lookup("k") is None
        await chain.close()
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    await chain.store("k", ANSWER, Freshness(60))
    assert await chain.lookup("k") is not None
    await chain.close()


async def test_what_can_not_be_told_is_a_miss_and_stored(clock, tmp_path, monkeypatch) -> None:
    chain = chain_of(DiskCache(tmp_path, 1 << 20, clock=clock), clock)
    old = chain.provenance(["tag:a"])
    await chain.purge("tag:a")

    def failing(*args: object) -> bytes:
        raise OSError("can't be read")

    with monkeypatch.context() as blind:
        blind.setattr(DiskCache, "reload", failing)
        assert not await chain.store("k", ANSWER, Freshness(60), provenance=old)
        assert await chain.store("k", ANSWER, Freshness(60), provenance=chain.provenance(["tag:a"]))
        assert await chain.lookup("k") is None
    assert await chain.lookup("k") is not None
    await chain.close()


async def test_requests_that_are_alike_join_before_the_file_is_open(clock, tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        disk = DiskCache(tmp_path, 1 << 20, clock=clock)
        purges, go = Purges(disk, clock=clock), asyncio.Event()
        flights = SingleFlight(max_bytes=100, is_purged=purges.is_purged)

        async def produce(flight: Flight) -> None:
            await go.wait()
            flight.end(ANSWER)

        joined = [
            flights.join("k", JSON, produce, purges.provenance(["tag:a"]))[1] for _ in range(3)
        ]
        assert not disk.is_open
        assert joined == [False, True, True]
    await disk.opened()
    # What was purged before can't be told from what was purged since, so only this is left alone.
    for label_, joins in (("tag:b", True), ("tag:a", False)):
        await purges.purge(label_)
        known = purges.provenance(["tag:a"])
        assert flights.join("k", JSON, produce, known)[1] is joins
    go.set()
    await flights.drain(HANGS_S)
    await disk.close()


class Refusing(DiskCache):
    async def update(self, name, change) -> bool:
        return False


class Hanging(DiskCache):
    async def update(self, name, change) -> bool:
        await asyncio.Event().wait()
        return True


@pytest.mark.parametrize("kind", [Refusing, Hanging])
async def test_says_when_a_purge_is_not_on_the_disk(clock, tmp_path: Path, kind) -> None:
    chain = chain_of(kind(tmp_path, 1 << 20, clock=clock), clock, deadline_s=0.01)
    await chain.store("k", ANSWER, Freshness(60), provenance=chain.provenance(["tag:a"]))
    with pytest.raises(PurgeError, match="it holds in this process"):
        await chain.purge("tag:a")
    assert await chain.lookup("k") is None
    await chain.store("k", ANSWER, Freshness(60), provenance=chain.provenance(["tag:a"]))
    assert await chain.lookup("k") is not None
    await chain.close()
