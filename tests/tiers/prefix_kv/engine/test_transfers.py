"""The worker's threads: what they copy, what they report, and what they drop."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic, sleep

import numpy as np
import pytest

from tests.waiting import HANGS_S
from tiers.prefix_kv.counters import EngineCounts
from tiers.prefix_kv.data_file import DATA
from tiers.prefix_kv.engine import transfers
from tiers.prefix_kv.engine.host_copies import HostCopies
from tiers.prefix_kv.engine.orders import LoadOrder, SaveOrder
from tiers.prefix_kv.engine.transfers import BlockLoader, BlockSaver, FinishedLoad
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.prefix_kv.store import Location, PrefixStore, StoreConfig

SCOPE = b"scope of rank  0"
PAGE = 3000
HASHES = [bytes([at]) * 32 for at in range(8)]
CHAIN = BlockChain(
    SCOPE,
    [BlockName(own, above, b"") for own, above in zip(HASHES, [b"", *HASHES], strict=False)],
)


class Worker:
    """A loader and a saver over an engine's cache of two layers."""

    def __init__(self, store: PrefixStore) -> None:
        self.store, self.counts, self.now = store, EngineCounts(), 1000.0
        self.cache = [np.zeros((16, PAGE), np.uint8) for _ in range(2)]
        self.copies = HostCopies(self.cache)
        clock = self.clock
        self.loader = BlockLoader(store, self.copies, 0, self.counts, clock)
        self.saver = BlockSaver(store, self.copies, lambda adapter: SCOPE, self.counts, clock)
        self.slots = self.saver._slots.qsize()

    def clock(self) -> float:
        return self.now

    def save(self, blocks: Sequence[int]) -> None:
        """Store blocks whose numbers are also their contents and their places in the cache."""
        for block in blocks:
            for layer in self.cache:
                layer[block] = block + 1
        self.saver.stage([SaveOrder(block, CHAIN, block, 1, 0) for block in blocks])

    def saved(self, blocks: Sequence[int]) -> list[list[Location]]:
        self.save(blocks)
        self.drain()
        found = [self.store.index.get(CHAIN.key(block)) for block in blocks]
        return [[Location.of(block)] for block in found if block is not None]

    def drain(self) -> None:
        wait_for(lambda: self.saver._slots.qsize() == self.slots)

    def load(self, request: str, locations: list[list[Location]], at: int = 8) -> None:
        ids = list(range(at, at + len(locations)))
        self.loader.start(LoadOrder(request, ids, locations, deadline_s=5.0))

    def results(self) -> list[FinishedLoad]:
        """Wait for a load to end."""
        found: list[FinishedLoad] = []
        wait_for(lambda: found.extend(self.loader.finished()) or found)
        return found

    def content(self, block: int) -> set[int]:
        return set(np.concatenate([layer[block] for layer in self.cache]).tolist())

    def close(self) -> None:
        self.saver.close()
        self.loader.close()


def wait_for(is_done: Callable[[], object]) -> None:
    give_up_at = monotonic() + HANGS_S
    while not is_done():
        assert monotonic() < give_up_at, "it hangs"
        sleep(0.001)


@pytest.fixture
def new_worker(tmp_path, monkeypatch) -> Iterator[Callable[[], Worker]]:
    monkeypatch.setattr(transfers, "STAGING_BYTES", 0)
    store = PrefixStore(StoreConfig(tmp_path, 2**26))
    made: list[Worker] = []

    def make() -> Worker:
        made.append(Worker(store))
        return made[-1]

    yield make
    for worker in made:
        worker.close()
    store.close()


@pytest.fixture
def worker(new_worker) -> Worker:
    return new_worker()


def blocked(monkeypatch, worker: Worker, name: str) -> tuple[threading.Event, threading.Event]:
    """Hold up a method of the store; returns the events of its begin and of its going on."""
    begun, goes_on, method = threading.Event(), threading.Event(), getattr(worker.store, name)

    def wait(*args):
        begun.set()
        assert goes_on.wait(HANGS_S)
        return method(*args)

    monkeypatch.setattr(worker.store, name, wait)
    return begun, goes_on


def test_blocks_go_to_disk_and_back(worker):
    locations = worker.saved([0, 1, 2])
    worker.load("r", locations)
    assert worker.results() == [FinishedLoad("r", [])]
    assert [worker.content(block) for block in (8, 9, 10, 11)] == [{1}, {2}, {3}, {0}]
    assert worker.counts.take().keys() == {"stored_blocks", "evicted_blocks", "store_seconds"}


def test_each_load_is_reported_once(worker):
    locations = worker.saved([0, 1])
    for number in range(3):
        worker.load(f"r{number}", locations)
    found: list[FinishedLoad] = []
    while len(found) < 3:
        found += worker.results()
    assert [each.request for each in found] == ["r0", "r1", "r2"]
    assert worker.loader.finished() == []


def test_nothing_is_taken_from_behind_a_damaged_block(worker, tmp_path):
    locations = worker.saved([0, 1, 2])
    with (tmp_path / DATA).open("r+b") as file:
        file.seek(locations[1][0].extents[0][0] * 4096)
        file.write(b"damaged")
    worker.load("r", locations)
    assert worker.results() == [FinishedLoad("r", [9, 10])]
    assert [worker.content(block) for block in (8, 9, 10)] == [{1}, {0}, {0}]
    assert worker.counts.take()["damaged_blocks"] == 1
    assert worker.store.index.get(CHAIN.key(1)) is None
    # Whoever finds it after that doesn't count it again.
    worker.load("again", locations)
    assert worker.results() == [FinishedLoad("again", [9, 10])]
    assert "damaged_blocks" not in worker.counts.take()


def test_a_block_of_another_size_is_not_loaded(worker):
    ((location,),) = worker.saved([0])
    worker.load("r", [[location._replace(size=PAGE)]])
    assert worker.results() == [FinishedLoad("r", [8])]


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError("EIO"), "can't be read"), (RuntimeError("a mistake"), "could not be loaded")],
)
def test_a_reader_that_fails_is_reported(worker, monkeypatch, caplog, error, said):
    locations = worker.saved([0, 1])
    worker.counts.take()

    def fail(*args):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(worker.store, "read", fail)
        worker.load("r", locations)
        assert worker.results() == [FinishedLoad("r", [8, 9])]
    assert worker.counts.take() == {"errors": 1}
    assert said in caplog.text
    worker.load("again", locations)
    assert worker.results() == [FinishedLoad("again", [])]


def test_a_late_load_is_given_up_and_writes_nothing_more(worker, monkeypatch):
    locations = worker.saved([0, 1])
    begun, goes_on = blocked(monkeypatch, worker, "read")
    worker.load("late", locations)
    worker.load("next", locations, at=12)
    assert begun.wait(HANGS_S)
    assert worker.loader.finished() == []
    worker.now += 6
    # The second one has waited for as long.
    assert worker.loader.finished() == [
        FinishedLoad("late", [8, 9]),
        FinishedLoad("next", [12, 13]),
    ]
    goes_on.set()
    worker.load("after", locations, at=10)
    assert worker.results() == [FinishedLoad("after", [])]
    assert [worker.content(block) for block in (8, 9, 12, 13)] == [{0}] * 4


def test_a_load_keeps_what_it_brought_in_time(worker, monkeypatch):
    locations = worker.saved([0, 1])
    read, goes_on = worker.store.read, threading.Event()

    def second_waits(location, *args):
        assert location.key == locations[0][0].key or goes_on.wait(HANGS_S)
        read(location, *args)

    monkeypatch.setattr(worker.store, "read", second_waits)
    worker.load("late", locations)
    wait_for(lambda: worker.content(8) == {1})
    wait_for(lambda: worker.loader._loads[0].done == 1)
    worker.now += 6
    assert worker.loader.finished() == [FinishedLoad("late", [9])]
    goes_on.set()
    worker.loader.close()
    assert worker.content(9) == {0}


def test_what_can_not_begin_is_not_reported(worker, monkeypatch):
    locations = worker.saved([0])

    def fail():
        raise RuntimeError("no stream")

    monkeypatch.setattr(worker.copies, "begin_loads", fail)
    with pytest.raises(RuntimeError):
        worker.load("r", locations)
    assert worker.loader._loads == []


def test_blocks_that_find_no_room_are_dropped(worker, monkeypatch):
    begun, goes_on = blocked(monkeypatch, worker, "write")
    worker.save([0])
    assert begun.wait(HANGS_S)
    worker.save([1, 2, 3, 4, 5])
    assert worker.counts.take()["dropped_blocks"] == 2
    assert worker.saver.over == 2
    goes_on.set()
    wait_for(lambda: worker.saver.over == 6)
    assert worker.store.statistics().blocks == 4


def test_the_engine_may_overwrite_a_block_that_is_staged(worker, monkeypatch):
    begun, goes_on = blocked(monkeypatch, worker, "write")
    worker.save([0])
    assert begun.wait(HANGS_S)
    worker.cache[0][0] = worker.cache[1][0] = 99
    goes_on.set()
    worker.drain()
    location = Location.of(worker.store.index.get(CHAIN.key(0)))
    worker.load("r", [[location]])
    assert worker.results() == [FinishedLoad("r", [])]
    assert worker.content(8) == {1}


@pytest.mark.parametrize("error", [OSError("ENOSPC"), RuntimeError("a mistake")])
def test_after_a_write_that_failed_blocks_are_dropped_for_a_while(
    worker, monkeypatch, caplog, error
):
    def fail(*args):
        raise error

    with monkeypatch.context() as full:
        full.setattr(worker.store, "write", fail)
        worker.save([0])
        worker.drain()
    assert worker.counts.take()["dropped_blocks"] == 1
    assert "tried again later" in caplog.text
    worker.save([0])
    counts = worker.counts.take()
    assert counts["dropped_blocks"] == 1
    assert "errors" not in counts
    worker.now += 31
    assert len(worker.saved([0])) == 1


def test_a_copy_that_fails_keeps_no_memory(worker, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(worker.copies, "save", None)
        with pytest.raises(TypeError):
            worker.save([0])
    assert worker.saver._slots.qsize() == worker.slots
    assert worker.saver.over == 1
    assert len(worker.saved([0])) == 1


def test_a_shutdown_stores_what_is_staged(new_worker, monkeypatch):
    worker = new_worker()
    begun, goes_on = blocked(monkeypatch, worker, "write")
    worker.save([0])
    assert begun.wait(HANGS_S)
    worker.save([1, 2])
    threading.Timer(0.05, goes_on.set).start()
    worker.close()
    assert worker.store.statistics().blocks == 3


def test_a_shutdown_does_not_wait_for_a_disk_that_hangs(new_worker, monkeypatch):
    monkeypatch.setattr(transfers, "_CLOSE_S", 0.01)
    worker = new_worker()
    begun, goes_on = blocked(monkeypatch, worker, "write")
    worker.save([0])
    assert begun.wait(HANGS_S)
    worker.saver.close()
    assert worker.saver._thread.is_alive()
    goes_on.set()
    worker.saver._thread.join(HANGS_S)
    assert not worker.saver._thread.is_alive()


def test_blocks_of_an_adapter_have_its_scope(new_worker, tmp_path):
    worker = new_worker()
    other = b"scope of adapter"
    worker.saver._scope = {"": SCOPE, "known": other}.__getitem__
    worker.saver.stage([SaveOrder(0, CHAIN._replace(adapter="known"), 0, 1, 0)])
    worker.drain()
    assert worker.store.index.get(other + HASHES[0]) is not None
    assert worker.store.index.get(CHAIN.key(0)) is None


def test_threads_survive_many_loads_and_stores_at_once(worker):
    locations = worker.saved([0, 1, 2, 3])
    jobs = [threading.Thread(target=partial(worker.save, [block])) for block in (4, 5, 6)]
    for job in jobs:
        job.start()
    seen: list[str] = []
    for number in range(50):
        worker.load(f"r{number}", locations)
        seen += [each.request for each in worker.loader.finished()]
    while len(seen) < 50:
        seen += [each.request for each in worker.results()]
    for job in jobs:
        job.join()
    assert sorted(seen) == sorted(f"r{number}" for number in range(50))
    assert [worker.content(block) for block in (8, 9, 10, 11)] == [{1}, {2}, {3}, {4}]
