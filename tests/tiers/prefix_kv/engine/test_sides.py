"""The scheduler's side: what it makes of a prompt, and how it measures steps."""

import pytest

from tiers.key import scope_named
from tiers.prefix_kv.engine.sides import Prompt, SchedulerSide, open_shared
from tiers.prefix_kv.engine.transfers import saver_slots
from tiers.prefix_kv.options import ConnectorOptions
from tiers.prefix_kv.store import PrefixStore, StoreConfig
from tiers.purges.table import label

SCOPE = b"scope of rank  0"


@pytest.fixture
def side(tmp_path, clock):
    store = PrefixStore(StoreConfig(tmp_path, 2**26))
    options = ConnectorOptions(str(tmp_path), 2**26, "m", "w", {"known": "f"}, store_after=1)
    made = SchedulerSide(options, store, [SCOPE], block_tokens=2, block_bytes=10, clock=clock)
    yield made
    made.close()
    store.close()


def prompt(**changed) -> Prompt:
    hashes = [b"a" * 32, b"b" * 32]
    return Prompt(hashes, [1, 2, 3, 2**31, 5], 5, "", "", is_plain=True, is_warm=False)._replace(
        **changed
    )


def chain_of(side: SchedulerSide, asked: Prompt):
    side.add("r", asked)
    return side.planner._requests["r"].chain


def test_a_chain_names_each_blocks_parent_and_tokens(side):
    first, second = chain_of(side, prompt()).names
    assert first == (b"a" * 32, b"", bytes([1, 0, 0, 0, 2, 0, 0, 0]))
    assert second == (b"b" * 32, b"a" * 32, bytes([3, 0, 0, 0, 0, 0, 0, 128]))


def test_a_chain_is_labelled_by_model_adapter_and_tenant(side):
    tenant = scope_named(b"someone")
    chain = chain_of(side, prompt(adapter="known", salt=f"{tenant}.nonce"))
    assert chain.labels == tuple(
        sorted([label("model", "m"), label("model", "known"), label("tenant", tenant)])
    )
    assert chain_of(side, prompt()).labels == (label("model", "m"),)


@pytest.mark.parametrize("asked", [prompt(adapter="unknown"), prompt(tokens=[]), prompt(number=6)])
def test_what_it_does_not_know_is_left_alone(side, asked):
    side.add("r", asked)
    assert not side.planner._requests


def rate(side: SchedulerSide) -> float:
    return side._gate._compute_rate


def test_a_step_is_measured_from_its_order_to_its_end(side, clock):
    side.begin_step(100)
    clock.now += 2
    side.finish((), set())
    assert rate(side) == 50.0
    # Between steps it isn't computing, and a step without tokens is none.
    clock.now += 100
    side.begin_step(0)
    clock.now += 100
    side.finish((), set())
    side.begin_step(100)
    clock.now += 2
    side.finish((), set())
    assert rate(side) == 50.0


def test_a_step_that_is_ordered_ahead_is_measured_from_the_end_of_the_last(side, clock):
    side.begin_step(100)
    for _ in range(5):
        clock.now += 1
        side.begin_step(100)
        clock.now += 1
        side.finish((), set())
    assert rate(side) == 50.0


def test_steps_whose_end_is_never_told_are_forgotten(side):
    for _ in range(100):
        side.begin_step(100)
    assert len(side._steps) <= 4


def test_a_load_that_failed_at_one_worker_failed(side, monkeypatch):
    ends = []
    monkeypatch.setattr(
        side.planner, "finish_load", lambda request, failed: ends.append((request, failed))
    )
    side.finish((), {"r"})
    side.finish({"other"}, set())
    side.finish({"r"}, set())
    assert ends == [("other", False), ("r", True)]
    assert not side._failed


def test_there_is_room_again_when_an_order_is_over_at_all_workers(tmp_path):
    store = PrefixStore(StoreConfig(tmp_path, 2**26))
    options = ConnectorOptions(str(tmp_path), 2**26, "m", "w")
    side = SchedulerSide(options, store, [SCOPE, SCOPE], block_tokens=2, block_bytes=2**24)
    assert side.planner.room == saver_slots(2**24) == 8
    side.planner.room = 0
    side.note_saves({0: 5})
    assert side.planner.room == 0
    side.note_saves({1: 3})
    assert side.planner.room == 3
    side.note_saves({0: 6, 1: 6})
    assert side.planner.room == 6
    side.close()
    store.close()


def test_a_process_opens_a_store_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tiers.prefix_kv.engine.sides._stores", {})
    config = StoreConfig(tmp_path, 2**26)
    store = open_shared(config)
    assert open_shared(StoreConfig(tmp_path, 2**26)) is store
    store.close()
