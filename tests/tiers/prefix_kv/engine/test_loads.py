"""What an engine loads, what it waits for, and that it never takes what isn't its own."""

import threading
import time
from collections.abc import Callable

import pytest

from tests.waiting import HANGS_S
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES
from tiers.prefix_kv.options import DISK_TOKENS, WARM
from tiers.prefix_kv.store import PrefixStore

from .prompts import prompt

pytestmark = pytest.mark.engine

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


class SlowDisk:
    """Holds up reads until it is told to go on."""

    def __init__(self, monkeypatch) -> None:
        self.is_fast, self.begun, self.ended = threading.Event(), threading.Event(), 0
        read = PrefixStore.read

        def wait(store: PrefixStore, *args) -> None:
            self.begun.set()
            assert self.is_fast.wait(HANGS_S)
            read(store, *args)
            self.ended += 1

        monkeypatch.setattr(PrefixStore, "read", wait)


@pytest.fixture
def slow_disk(monkeypatch):
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.is_fast.set()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefix_is_loaded_after_a_restart(new_engine, layout):
    first = new_engine(layout=layout)
    assert first.ask("cold", prompt(10)) == 161
    first.assert_is_idle()
    second = new_engine(layout=layout)
    assert second.ask("warm", prompt(10)) == 1
    second.assert_is_idle()
    assert second.reported == ["warm"]
    counts = second.counts()
    assert (counts["hits"], counts["loaded_tokens"], counts["lookups"]) == (1, 160, 1)
    assert counts["queried_tokens"] == 161


def test_another_question_is_computed_from_where_it_differs(new_engine):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    assert second.ask("other", prompt(10)[:100] + prompt(4, seed=1)) == 69
    assert second.ask("again", prompt(10)[:100] + prompt(4, seed=1)) == 5


def test_the_last_block_of_an_exact_prompt_is_computed_as_in_the_engines_own_cache(new_engine):
    first = new_engine()
    first.ask("cold", prompt(10, extra=0))
    assert first.ask("hot", prompt(10, extra=0)) == 16
    assert new_engine().ask("warm", prompt(10, extra=0)) == 16


def test_the_loaded_tokens_are_told_with_the_answer(new_engine):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    told = []
    finish = second.connector.request_finished_all_groups
    second.connector.request_finished_all_groups = lambda *args: (
        told.append(finish(*args))
        or (
            False,
            None,
        )
    )
    second.ask("warm", prompt(10))
    second.ask("hot", prompt(10))
    assert told == [(False, {DISK_TOKENS: 160}), (False, None)]


def test_blocks_are_taken_twice_and_loaded_once(new_engine):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    seen = []
    update = second.connector.update_state_after_alloc
    second.connector.update_state_after_alloc = lambda request, blocks, number: (
        seen.append(number) or update(request, blocks, number)
    )
    second.ask("warm", prompt(10), max_tokens=3)
    assert seen == [160, 0]
    assert second.reported == ["warm"]


def test_a_load_goes_on_after_its_request_was_aborted(new_engine, slow_disk):
    new_engine().ask("cold", prompt(10))
    second = new_engine(blocks=16)
    second.add("warm", prompt(10))
    second.step()
    assert slow_disk.begun.wait(HANGS_S)
    second.abort("warm")
    for _ in range(3):
        second.step()
    assert second.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < 15
    slow_disk.is_fast.set()
    second.wait_for(lambda: second.step() and bool(second.reported))
    second.assert_is_idle()
    assert second.ask("other", prompt(14, seed=3)) == 225
    second.assert_is_idle()


def test_a_preempted_request_is_computed_and_loads_no_second_time(new_engine):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    second.add("warm", prompt(10), max_tokens=5)
    second.wait_for(lambda: second.step() and second.computed_tokens)
    assert second.scheduler.reset_prefix_cache(reset_running_requests=True)
    second.run()
    assert second.computed_tokens["warm"] > 160
    assert second.reported == ["warm"]
    second.assert_is_idle()


def test_requests_with_the_same_prefix_load_it_once(new_engine, slow_disk):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    for number in range(3):
        second.add(f"warm{number}", prompt(10) + prompt(1, seed=number))
    for _ in range(3):
        second.step()
    slow_disk.is_fast.set()
    second.run()
    assert second.reported == ["warm0"]
    # Each computes what only it asks for.
    assert set(second.computed_tokens.values()) == {18}
    second.assert_is_idle()


def test_a_burst_waits_for_its_turn(new_engine, monkeypatch):
    first = new_engine(blocks=256)
    for number in range(20):
        first.ask(f"cold{number}", prompt(6, seed=number + 1))
    second = new_engine(blocks=256)
    for number in range(20):
        second.add(f"warm{number}", prompt(6, seed=number + 1))
    planner, at_once = second.planner, []
    load = planner.load

    def counted(*args) -> None:
        load(*args)
        # After the step some may be over.
        at_once.append(len(planner._loads))

    monkeypatch.setattr(planner, "load", counted)
    second.run()
    assert max(at_once) == 8
    assert sorted(second.reported) == sorted(second.requests)
    assert set(second.computed_tokens.values()) == {1}
    second.assert_is_idle()


def test_a_load_that_takes_too_long_is_computed_and_writes_nothing_later(
    new_engine, slow_disk, monkeypatch
):
    new_engine().ask("cold", prompt(10))
    second = new_engine(blocks=16)
    monkeypatch.setattr(second.planner.gate, "deadline_s", lambda tokens: HANGS_S)
    # It is late as soon as it reads.
    late = lambda: time.monotonic() + 2 * HANGS_S * slow_disk.begun.is_set()  # noqa: E731
    monkeypatch.setattr(second.worker.loader, "_clock", late)
    assert second.ask("late", prompt(10)) == 161
    assert second.counts()["failed_loads"] == 1
    second.planner.gate._paused_until = 0.0
    # The blocks are another's now; each step checks them.
    second.add("other", prompt(12, seed=3), max_tokens=20)
    second.step()
    slow_disk.is_fast.set()
    second.wait_for(lambda: slow_disk.ended)
    second.run()
    assert second.computed_tokens["other"] == 193 + 19
    second.assert_is_idle()


def test_no_request_hangs_without_a_reader(new_engine, monkeypatch):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    second.worker.loader._queue.put(None)
    second.worker.loader._thread.join()
    monkeypatch.setattr(second.planner.gate, "deadline_s", lambda tokens: 0.01)
    assert second.ask("warm", prompt(10)) == 161
    second.assert_is_idle()


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_damaged_block_is_computed_and_stored_again(new_engine, tmp_path, at):
    first = new_engine()
    first.ask("cold", prompt(10))
    second = new_engine()
    key = first.key("cold", at)
    block = second.store.index.get(key)
    with (tmp_path / "store" / DATA).open("r+b") as file:
        file.seek(block.extents[0][0] * PAGE_BYTES + 100)
        file.write(b"damaged")
    # Up to it, blocks are loaded; of the others, none is taken from behind a hole.
    assert second.ask("warm", prompt(10)) == 161 - at * 16
    assert second.reported == ["warm"]
    assert second.counts(second.worker)["damaged_blocks"] == 1
    assert second.ask("hot", prompt(10)) == 1
    second.assert_is_idle()
    third = new_engine()
    assert third.store.index.get(key).sequence > block.sequence
    assert third.ask("again", prompt(10)) == 1


def test_blocks_that_another_took_the_place_of_are_computed(new_engine, monkeypatch):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    lookup = second.store.index.lookup

    def stale(chain):
        found = lookup(chain)
        for block in found:
            second.store.index.remove(block.key, block.sequence, block.extents)
        return found

    monkeypatch.setattr(second.store.index, "lookup", stale)
    second.ask("warm", prompt(10))
    # The pages are still what they were, so they verify; nobody calls them damaged.
    assert second.reported == ["warm"]
    assert "damaged_blocks" not in second.counts(second.worker)


def test_it_computes_while_that_is_faster(new_engine, monkeypatch):
    new_engine().ask("cold", prompt(10))
    second = new_engine()
    monkeypatch.setattr(second.planner.gate, "is_worth", lambda tokens: False)
    assert second.ask("warm", prompt(10)) == 161
    assert second.reported == []


def test_short_prefixes_are_computed(new_engine):
    new_engine().ask("cold", prompt(10))
    second = new_engine(min_tokens=65)
    assert second.ask("short", prompt(4)) == 65
    assert second.ask("long", prompt(10)) == 161 - 64 - 96


def asked_with(**others) -> Callable[..., int]:
    return lambda engine, name: engine.ask(name, prompt(10), **others)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"salt": "a.1"}, {"salt": "b.1"}),
        ({"salt": "a.1"}, {}),
        ({}, {"salt": "a.1"}),
        ({}, {"adapter": "known"}),
        ({"adapter": "known"}, {}),
        ({"adapter": "known"}, {"adapter": "other"}),
    ],
    ids=str,
)
def test_nobody_takes_what_was_computed_for_another(new_engine, first, second):
    adapters = {"known": "f1", "other": "f2"}
    new_engine(adapters=adapters).ask("theirs", prompt(10), **first)
    engine = new_engine(adapters=adapters)
    assert engine.ask("other", prompt(10), **second) == 161
    assert engine.reported == []
    assert engine.ask("same", prompt(10), **first) == 1
    assert engine.reported == ["same"]


def test_an_adapter_with_other_contents_has_blocks_of_its_own(new_engine):
    new_engine(adapters={"known": "f1"}).ask("cold", prompt(10), adapter="known")
    engine = new_engine(adapters={"known": "f2"})
    assert engine.ask("swapped", prompt(10), adapter="known") == 161


def test_an_unknown_adapter_is_left_alone(new_engine):
    first = new_engine()
    assert first.ask("unknown", prompt(10), adapter="unknown") == 161
    assert new_engine().store.statistics().blocks == 0
    assert "errors" not in first.counts()


def test_requests_that_only_warm_the_engine_are_counted_apart(new_engine):
    first = new_engine(store_after=2)
    for number in range(3):
        first.ask(f"warm{number}", prompt(10), params=dict(WARM))
    assert first.counts().keys() <= {"errors"}
    first.ask("real", prompt(10))
    first.drain()
    assert first.store.statistics().blocks == 0
    first.ask("real again", prompt(10))
    second = new_engine()
    assert second.store.statistics().blocks == 10
    assert second.ask("warm", prompt(10), params=dict(WARM)) == 1
    assert second.counts() == {"warmed_tokens": 160}


def test_another_model_finds_nothing(new_engine):
    new_engine(weights="w1").ask("cold", prompt(10))
    assert new_engine(weights="w2").ask("other", prompt(10)) == 161


def test_a_reset_purges_the_model(new_engine):
    first = new_engine()
    first.ask("cold", prompt(10))
    first.drain()
    assert first.scheduler.reset_prefix_cache(reset_connector=True)
    first.wait_for(lambda: first.store.index.purge_epoch() > 0)
    # It is stored anew at once.
    assert first.ask("again", prompt(10)) == 161
    second = new_engine()
    assert second.ask("warm", prompt(10)) == 1


def test_of_two_connectors_one_loads_and_both_store(new_engine, tmp_path):
    from .engine import Engine

    new_engine().ask("cold", prompt(10))

    def child(folder):
        from tiers.prefix_kv.options import ConnectorOptions

        options = ConnectorOptions(
            str(tmp_path / folder), 2**27, "m", "w", store_after=1, min_tokens=1
        )
        return options.engine_options()["kv_transfer_config"]

    children = {"connectors": [child("empty"), child("store")]}
    transfer = {
        "kv_connector": "MultiConnector", "kv_connector_module_path": None,
        "kv_connector_extra_config": children,
    }  # fmt: skip
    both = Engine(tmp_path, transfer=transfer)
    try:
        assert both.ask("warm", prompt(10) + prompt(2, seed=1)) == 34
        assert both.reported == ["warm"]
        empty = both.connector._connectors[0]._scheduler
        assert not empty.planner._requests
        assert not empty.planner._loads
    finally:
        both.close()
    # What one has loaded, the other has stored.
    (options,) = (each._options for each in both.connector._connectors[:1])
    from tiers.prefix_kv.engine import sides

    assert sides.open_shared(options.store({})).statistics().blocks == 12
