"""Counts of requests, and what is written of them in the background."""

import lmdb
import pytest

from tests.tiers.prefix_kv.blocks import ROOMY, opened
from tiers.prefix_kv.engine import bookkeeping
from tiers.prefix_kv.engine.bookkeeping import Bookkeeper
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.index.index_file import INDEX
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.prefix_kv.store import PrefixStore, StoreConfig

SCOPE = b"scope of rank  0"
HASHES = [bytes([at]) * 32 for at in range(4)]


@pytest.fixture
def index(tmp_path):
    store = opened(tmp_path)
    yield store.index
    store.close()


@pytest.fixture
def new_books(index):
    made = []

    def make(blocks: int = 100, scope: bytes | None = SCOPE, clock=lambda: 0.0) -> Bookkeeper:
        made.append(Bookkeeper(index, "m", scope, blocks, clock))
        return made[-1]

    yield make
    for books in made:
        books.close()


def store(index: PrefixIndex) -> None:
    names = [
        BlockName(own, parent, b"") for own, parent in zip(HASHES, [b"", *HASHES], strict=False)
    ]
    chain = BlockChain(SCOPE, names)
    reserved, _ = index.reserve([NewBlock(chain, at, 10, 1, 0) for at in range(len(names))])
    index.publish([(each, bytes(16)) for each in reserved])


def test_requests_are_counted_and_known_over_restarts(new_books):
    first = new_books()
    assert first.record(HASHES) == [1, 1, 1, 1]
    assert first.record(HASHES[:2]) == [2, 2]
    first.close()
    second = new_books()
    assert second.estimate(HASHES) == [2, 2, 1, 1]
    assert second.record(HASHES) == [3, 3, 2, 2]


def test_engines_add_their_counts(new_books):
    ours, theirs = new_books(), new_books()
    ours.record(HASHES)
    theirs.record(HASHES)
    ours.flush(is_last=True)
    theirs.flush(is_last=True)
    assert theirs.estimate(HASHES) == [2, 2, 2, 2]
    # What others count is known when ours is written.
    assert ours.estimate(HASHES) == [1, 1, 1, 1]
    ours.record(HASHES[:1])
    ours.flush(is_last=True)
    assert ours.estimate(HASHES) == [3, 2, 2, 2]


def test_what_is_counted_while_counts_are_written_is_not_lost(new_books, monkeypatch):
    books = new_books()
    books.record(HASHES[:1])
    load = bookkeeping._load

    def count_too(sketch, data) -> None:
        monkeypatch.setattr(bookkeeping, "_load", load)
        books.record(HASHES[:1])
        load(sketch, data)

    monkeypatch.setattr(bookkeeping, "_load", count_too)
    books.flush(is_last=True)
    books.flush(is_last=True)
    assert books.estimate(HASHES[:1]) == [2]


def test_counts_of_large_stores_are_written_rarely(new_books, index):
    now = [0.0]
    books = new_books(blocks=2**15, clock=lambda: now[0])
    books.record(HASHES)
    books.flush()
    assert index.sketch(SCOPE) is None
    now[0] += 16.0
    books.flush()
    assert index.sketch(SCOPE) is not None


def test_counts_of_another_size_begin_anew(new_books, caplog):
    first = new_books()
    first.record(HASHES)
    first.close()
    with caplog.at_level("INFO"):
        second = new_books(blocks=2**15)
    assert second.estimate(HASHES) == [0, 0, 0, 0]
    assert "begin anew" in caplog.text


def test_one_without_a_scope_counts_no_requests(new_books, index, caplog):
    books = new_books(blocks=0, scope=None)
    books.record(HASHES)
    books.counts.add("errors")
    with caplog.at_level("INFO"):
        books.close()
    assert index.counters() == {("m", "errors"): 1.0}
    assert not caplog.text


def test_counters_are_added_up(new_books, index):
    books = new_books()
    for number in (1, 0.5):
        books.counts.add("saved_seconds", number)
        books.flush()
    assert index.counters() == {("m", "saved_seconds"): 1.5}


def test_an_idle_engine_writes_nothing(new_books, index, monkeypatch):
    books = new_books()
    books.flush()
    monkeypatch.setattr(index._file, "writing", None)
    books.flush()
    books.counts.add("errors")
    with pytest.raises(TypeError):
        books.flush()


def test_a_request_raises_the_priority_of_its_blocks(new_books, index):
    store(index)
    books = new_books()
    before = index.get(SCOPE + HASHES[0]).priority
    keys = [SCOPE + each for each in HASHES]
    books.touch(keys, [3, 3, 2, 2])
    books.touch(keys, [4, 4, 3, 3])
    books.flush()
    priorities = [index.get(key).priority for key in keys]
    assert priorities == [4, 4, 3, 3]
    assert before == 1


def test_touches_are_bounded(new_books, monkeypatch):
    monkeypatch.setattr(bookkeeping, "_MAX_TOUCHED", 6)
    books = new_books()
    for _ in range(3):
        books.touch(HASHES, [1, 1, 1, 1])
    assert len(books._touched) == 1
    books.flush()
    assert books._touched_blocks == 0


def test_many_touches_take_several_transactions():
    chains = [([b"k"] * blocks, [1] * blocks) for blocks in (300, 300, 100, 600)]
    batches = bookkeeping._batches(chains)
    assert [[len(keys) for keys, _ in batch] for batch in batches] == [[300], [300, 100], [600]]


def test_an_index_that_fails_is_counted(new_books, index, monkeypatch, caplog):
    books = new_books()
    books.counts.add("hits")

    def fail(*args):
        raise lmdb.MapFullError("full")

    with monkeypatch.context() as broken:
        broken.setattr(index, "save", fail)
        books.flush()
    assert "could not be written" in caplog.text
    books.flush()
    assert index.counters() == {("m", "errors"): 1.0}


def test_expired_blocks_are_removed(tmp_path):
    now = [1000.0]
    opening = PrefixStore(StoreConfig(tmp_path, 2**26, ttl_s=10), lambda: now[0], limits=ROOMY)
    index = opening.index
    store(index)
    books = Bookkeeper(index, "m", SCOPE, 100)
    now[0] += 11
    books.counts.add("lookups")
    books.flush()
    assert index.statistics().blocks == 0
    books.close()
    opening.close()


def test_a_store_that_was_begun_anew_is_used_no_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bookkeeping, "_FLUSH_S", 0.01)
    store = opened(tmp_path)
    books = Bookkeeper(store.index, "m")
    (tmp_path / INDEX).unlink()
    books._thread.join()
    assert books.is_lost
    assert caplog.text.count("aren't used until this engine is restarted") == 1
    store.close()
