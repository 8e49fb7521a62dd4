"""What the scheduler's side decides, step by step."""

from collections.abc import Iterator, Sequence

import pytest

from tests.tiers.prefix_kv.blocks import opened
from tiers.prefix_kv.engine import planner as module
from tiers.prefix_kv.engine.bookkeeping import Bookkeeper
from tiers.prefix_kv.engine.planner import Planner, RequestProgress
from tiers.prefix_kv.engine.rates import LoadGate
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.purges.table import PurgeTable, label

TOKENS = 16
SCOPES = (b"scope of rank  0", b"scope of rank  1")


def chain(blocks: int, seed: int = 0, labels: tuple[str, ...] = ()) -> BlockChain:
    hashes = [bytes([seed, at]) * 16 for at in range(blocks)]
    names = [
        BlockName(own, parent, bytes(4 * TOKENS))
        for own, parent in zip(hashes, [b"", *hashes], strict=False)
    ]
    return BlockChain(SCOPES[0], names, labels)


class Engine:
    """A planner, with what is around it."""

    def __init__(self, index: PrefixIndex, scopes: Sequence[bytes], store_after: int = 1) -> None:
        self.index, self.now, self.scopes = index, 1000.0, scopes
        self.books = Bookkeeper(index, "m", scopes[0], 100)
        self.gate = LoadGate(1, self.clock)
        self.planner = Planner(
            index, self.books, lambda adapter: self.scopes, block_tokens=TOKENS,
            store_after=store_after, gate=self.gate, clock=self.clock,
        )  # fmt: skip

    def clock(self) -> float:
        return self.now

    def store(self, blocks: BlockChain, scopes: Sequence[bytes] | None = None) -> None:
        for scope in scopes or self.scopes:
            new = [
                NewBlock(blocks._replace(scope=scope), at, 100, 1, self.index.purge_epoch())
                for at in range(len(blocks.names))
            ]
            reserved, _ = self.index.reserve(new)
            self.index.publish([(each, bytes(16)) for each in reserved])

    def add(self, request: str, blocks: BlockChain, *, is_warm: bool = False) -> None:
        self.planner.add(request, blocks, len(blocks.names) * TOKENS + 1, is_warm=is_warm)

    def load(self, request: str, blocks: int = 4, ids: Sequence[int] = range(100, 120)) -> None:
        assert self.planner.match(request, 0) == blocks
        self.planner.load(request, blocks, ids)

    def saved(self, request: str, blocks: int) -> list[int]:
        """Return the positions of blocks that are ordered to be stored."""
        ids = [10 * at for at in range(blocks)]
        saves = self.planner.saves([RequestProgress(request, blocks, ids)])
        assert all(each.block_id == 10 * each.at for each in saves)
        return [each.at for each in saves]


@pytest.fixture
def index(tmp_path) -> Iterator[PrefixIndex]:
    store = opened(tmp_path)
    yield store.index
    store.close()


@pytest.fixture
def engine(index) -> Iterator[Engine]:
    made = Engine(index, SCOPES[:1])
    yield made
    made.books.close()


def test_it_loads_what_the_engine_does_not_have(engine):
    engine.store(chain(4))
    engine.add("r", chain(6))
    assert engine.planner.match("r", 1) == 3
    engine.planner.load("r", 3, [7, 8, 9, 10, 11])
    (order,) = engine.planner.take_orders().loads
    assert (order.request, order.block_ids) == ("r", [8, 9, 10])
    keys = [location.key for (location,) in order.locations]
    assert keys == [chain(4).key(at) for at in (1, 2, 3)]
    assert not engine.planner.take_orders().loads
    engine.planner.finish_load("r", failed=False)
    assert engine.planner.remove("r") == 48


def test_all_workers_must_have_a_block(index):
    both = Engine(index, SCOPES)
    both.store(chain(4), SCOPES[:1])
    both.store(chain(2), SCOPES[1:])
    both.add("r", chain(4))
    assert both.planner.match("r", 0) == 2
    both.planner.load("r", 2, range(4))
    (order,) = both.planner.take_orders().loads
    assert [[each.key[:16] for each in block] for block in order.locations] == [list(SCOPES)] * 2
    assert both.saved("r", 4) == [2, 3]
    both.books.close()


def test_a_token_is_left_to_compute(engine):
    engine.store(chain(4))
    engine.planner.add("r", chain(4), 4 * TOKENS, is_warm=False)
    assert engine.planner.match("r", 0) == 3
    assert engine.planner.match("r", 3) == 0
    assert engine.planner.match("r", 4) == 0


def test_asking_again_changes_nothing(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    assert [engine.planner.match("r", 0) for _ in range(3)] == [4, 4, 4]
    assert engine.books.counts.take() == {"lookups": 1, "queried_tokens": 65}


def test_a_lookup_holds_for_a_moment(engine):
    engine.add("r", chain(4))
    assert engine.planner.match("r", 0) == 0
    engine.store(chain(4))
    assert engine.planner.match("r", 0) == 0
    engine.now += 1
    assert engine.planner.match("r", 0) == 4


def test_a_request_loads_once(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    engine.load("r")
    assert engine.planner.match("r", 0) == 0
    engine.planner.finish_load("r", failed=True)
    assert engine.planner.match("r", 0) == 0
    assert engine.books.counts.take()["failed_loads"] == 1


def test_others_wait_for_what_is_being_loaded(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    engine.add("other", chain(4))
    engine.load("r")
    assert engine.planner.match("other", 0) is None
    # What the engine's cache has by now, it needn't wait for.
    assert engine.planner.match("other", 4) == 0
    engine.planner.finish_load("r", failed=False)
    assert engine.planner.match("other", 0) == 4


def test_nobody_waits_for_ever(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    engine.add("other", chain(4))
    engine.load("r")
    assert engine.planner.match("other", 0) is None
    engine.now += engine.gate.deadline_s(4 * TOKENS)
    assert engine.planner.match("other", 0) == 0


def test_only_so_many_loads_at_once(engine):
    for number in range(9):
        engine.store(chain(4, seed=number))
        engine.add(f"r{number}", chain(4, seed=number))
    for number in range(8):
        engine.load(f"r{number}")
    assert engine.planner.match("r8", 0) is None
    engine.planner.finish_load("r3", failed=False)
    engine.load("r8")


def test_a_request_that_is_gone_leaves_its_load_to_end(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    engine.load("r")
    assert engine.planner.remove("r") == 0
    engine.add("other", chain(4))
    assert engine.planner.match("other", 0) is None
    engine.planner.finish_load("r", failed=False)
    assert engine.planner.match("other", 0) == 4
    assert engine.planner.remove("r") == 0
    engine.planner.finish_load("unknown", failed=True)


def test_a_request_that_is_given_up_is_told_so(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    engine.planner.give_up("r")
    assert engine.planner.take_orders().lost == ["r"]
    assert engine.planner.match("r", 0) == 0
    assert engine.saved("r", 4) == []


def test_blocks_are_stored_as_they_are_filled(engine):
    engine.add("r", chain(6))
    assert engine.saved("r", 2) == [0, 1]
    assert not engine.planner.is_due("r", 2)
    assert engine.planner.is_due("r", 3)
    assert engine.saved("r", 6) == [2, 3, 4, 5]
    # Generated blocks aren't due.
    assert not engine.planner.is_due("r", 9)
    assert engine.saved("r", 9) == []
    assert not engine.planner.is_due("unknown", 9)


def test_what_is_stored_is_not_stored_again(engine):
    engine.store(chain(3))
    engine.add("r", chain(6))
    assert engine.saved("r", 6) == [3, 4, 5]
    engine.add("again", chain(6))
    assert engine.saved("again", 6) == []
    engine.now += 61
    engine.add("later", chain(6))
    assert engine.saved("later", 6) == [3, 4, 5]


@pytest.mark.parametrize("store_after", [1, 2, 3])
def test_blocks_are_stored_after_so_many_requests(index, store_after):
    engine = Engine(index, SCOPES[:1], store_after)
    saved = []
    for number in range(4):
        engine.add(f"{number}", chain(4))
        saved.append(bool(engine.saved(f"{number}", 4)))
    assert saved.index(True) == store_after - 1
    assert saved.count(True) == 1
    engine.books.close()


def test_what_was_requested_before_a_purge_is_not_stored_after_it(engine):
    blocks = chain(3, labels=("model:m",))
    engine.add("before", blocks)
    engine.index.merge_purges(PurgeTable().with_purge(10**15, label("model", "m")))
    saves = engine.planner.saves([RequestProgress("before", 3, range(3))])
    new = [NewBlock(each.chain, each.at, 100, each.requests, each.purge_epoch) for each in saves]
    assert engine.index.reserve(new) == ([], 0)
    engine.add("after", blocks)
    saves = engine.planner.saves([RequestProgress("after", 3, range(3))])
    assert [each.purge_epoch for each in saves] == [10**15] * 3


def test_a_purge_is_noticed_at_once(engine):
    labels = (label("model", "m"),)
    engine.add("r", chain(4, labels=labels))
    assert engine.saved("r", 4) == [0, 1, 2, 3]
    engine.index.merge_purges(PurgeTable().with_purge(10**15, label("model", "m")))
    engine.add("again", chain(4, labels=labels))
    assert engine.saved("again", 4) == [0, 1, 2, 3]


def test_what_could_not_be_loaded_is_stored_again(engine):
    engine.store(chain(4))
    engine.add("r", chain(4))
    assert engine.saved("r", 4) == []
    engine.load("r")
    damaged = engine.index.get(chain(4).key(2))
    engine.index.remove(damaged.key, damaged.sequence, damaged.extents)
    engine.planner.finish_load("r", failed=True)
    engine.add("again", chain(4))
    assert engine.saved("again", 4) == [2]


def test_blocks_wait_in_the_engine_until_workers_have_room(engine):
    engine.store(chain(2))
    engine.add("r", chain(8))
    engine.planner.room = 3
    assert engine.saved("r", 8) == [2]
    assert engine.saved("r", 8) == [3, 4]
    assert engine.saved("r", 8) == []
    engine.planner.room += 2
    assert engine.saved("r", 8) == [5, 6]
    engine.planner.remove("r")
    assert engine.books.counts.take()["dropped_blocks"] == 1


def test_requests_share_the_room(engine):
    engine.planner.room = 5
    for number in range(3):
        engine.add(f"{number}", chain(4, seed=number))
    progress = [RequestProgress(f"{number}", 4, range(4)) for number in range(3)]
    assert [each.at for each in engine.planner.saves(progress)] == [0, 1, 2, 3, 0]
    engine.planner.room = 9
    assert [each.at for each in engine.planner.saves(progress)] == [1, 2, 3, 0, 1, 2, 3]
    assert engine.planner.room == 2


def test_it_remembers_only_so_many_blocks(engine, monkeypatch):
    monkeypatch.setattr(module, "_MAX_HELD", 10)
    for number in range(10):
        engine.add("r", chain(4, seed=number))
        engine.saved("r", 4)
    assert len(engine.planner._held) <= 10


def test_warm_requests_are_counted_apart(engine):
    engine.store(chain(4))
    engine.add("warm", chain(4), is_warm=True)
    engine.load("warm")
    engine.planner.finish_load("warm", failed=False)
    assert engine.planner.remove("warm") == 64
    assert engine.books.counts.take() == {"warmed_tokens": 64}
    engine.add("real", chain(4))
    assert engine.planner._requests["real"].counts == [1, 1, 1, 1]


def test_seconds_that_a_load_saves_are_counted(engine):
    engine.store(chain(4))
    engine.gate.note_computed(64, 1.0)
    engine.add("r", chain(4))
    engine.load("r")
    engine.now += 0.25
    engine.planner.finish_load("r", failed=False)
    counts = engine.books.counts.take()
    assert (counts["load_seconds"], counts["saved_seconds"]) == (0.25, 0.75)
    assert (counts["hits"], counts["loaded_tokens"]) == (1, 64)


def test_steps_beside_a_load_do_not_make_it_slow(engine):
    engine.store(chain(4))
    engine.gate.note_computed(64, 1.0)
    engine.add("r", chain(4))
    engine.load("r")
    # It begins after the step in which it is ordered.
    engine.now += 10.25
    engine.gate.note_computed(640, 10.0)
    engine.planner.finish_load("r", failed=False)
    counts = engine.books.counts.take()
    assert (counts["load_seconds"], counts["saved_seconds"]) == (10.25, 0.75)
    assert engine.gate.is_worth(64)


def test_seconds_that_a_load_loses_are_counted(engine):
    engine.store(chain(4))
    engine.gate.note_computed(64, 1.0)
    for request, seconds in (("slow", 3.0), ("failed", 5.0)):
        engine.add(request, chain(4))
        engine.gate._load_s = 0.0
        engine.load(request)
        engine.now += seconds
        engine.planner.finish_load(request, failed=request == "failed")
    assert engine.books.counts.take()["lost_seconds"] == 2.0 + 5.0


def test_a_prompt_shorter_than_a_block_is_nothing(engine):
    engine.planner.add("r", BlockChain(SCOPES[0], []), 5, is_warm=False)
    assert engine.planner.match("r", 0) == 0
    assert engine.saved("r", 0) == []
