"""Whatever fails in the connector, the engine computes."""

import threading

import lmdb
import pytest

from tiers.prefix_kv.engine.bookkeeping import Bookkeeper
from tiers.prefix_kv.engine.host_copies import HostCopies
from tiers.prefix_kv.engine.planner import Planner
from tiers.prefix_kv.engine.sides import SchedulerSide, WorkerSide
from tiers.prefix_kv.engine.transfers import BlockLoader, BlockSaver
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.store import PrefixStore

from .prompts import prompt

pytestmark = pytest.mark.engine

HOOKS = [
    (SchedulerSide, "add"),
    (SchedulerSide, "finish"),
    (Planner, "add"),
    (Planner, "match"),
    (Planner, "load"),
    (Planner, "is_due"),
    (Planner, "saves"),
    (Planner, "finish_load"),
    (Planner, "remove"),
    (Bookkeeper, "record"),
    (PrefixIndex, "lookup"),
    (PrefixIndex, "holds"),
    (PrefixIndex, "purge_epoch"),
    (BlockLoader, "start"),
    (BlockSaver, "stage"),
    (HostCopies, "save"),
    (HostCopies, "load"),
    (HostCopies, "protect"),
    (HostCopies, "begin_loads"),
    (PrefixStore, "read"),
    (PrefixStore, "write"),
    (WorkerSide, "take_failed_requests"),
]


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), lmdb.Error("broken"), OSError("EIO")])
@pytest.mark.parametrize(("owner", "name"), HOOKS, ids=lambda each: getattr(each, "__name__", each))
def test_every_hook_fails_open(new_engine, monkeypatch, owner, name, error):
    new_engine().ask("cold", prompt(10))
    engine = new_engine()

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        # Loads that nobody hears the end of give way to others after this time.
        broken.setattr(engine.planner.gate, "deadline_s", lambda tokens: 0.05)
        for number in range(3):
            engine.add(f"warm{number}", prompt(10) + prompt(3, seed=number), max_tokens=3)
            engine.add(f"other{number}", prompt(5, seed=number + 3))
        engine.run()
        assert not engine.scheduler.requests
        assert len(engine.reported) == len(set(engine.reported))
    # Then it goes on as if nothing had been.
    engine.planner.gate._paused_until = 0.0
    engine.ask("again", prompt(4, seed=9))
    assert not engine.scheduler.requests


def test_a_load_that_can_not_be_ordered_is_computed(new_engine, monkeypatch, caplog):
    new_engine().ask("cold", prompt(10))
    engine = new_engine()
    with monkeypatch.context() as broken:
        broken.setattr(Planner, "load", None)
        assert engine.ask("warm", prompt(10)) == 161
    assert engine.reported == ["warm"]
    assert engine.counts()["errors"] == 1
    assert caplog.text.count("the engine computes instead") == 1
    engine.assert_is_idle()


def test_a_load_that_can_not_begin_is_computed(new_engine, monkeypatch):
    new_engine().ask("cold", prompt(10))
    engine = new_engine()
    with monkeypatch.context() as broken:
        broken.setattr(HostCopies, "begin_loads", None)
        assert engine.ask("warm", prompt(10)) == 161
    assert engine.reported == ["warm"]
    assert engine.counts()["failed_loads"] == 1
    engine.assert_is_idle()


def test_loads_are_ordered_where_stores_fail(new_engine, monkeypatch):
    new_engine().ask("cold", prompt(10))
    engine = new_engine()
    with monkeypatch.context() as broken:
        broken.setattr(PrefixIndex, "holds", None)
        # The other one's blocks are due in the step in which the load is ordered.
        engine.add("other", prompt(5, seed=1))
        engine.add("warm", prompt(10))
        engine.run()
    assert engine.computed_tokens["warm"] == 1


def test_a_worker_that_can_not_begin_leaves_the_engine_alone(new_engine, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(BlockSaver, "__init__", None)
        engine = new_engine()
    assert engine.connector._scheduler is None
    assert not any(each.name.startswith("prefix") for each in threading.enumerate())
    assert engine.ask("cold", prompt(10)) == 161
    engine.close()


def test_the_same_failure_is_logged_three_times(new_engine, monkeypatch, caplog):
    engine = new_engine()
    with monkeypatch.context() as broken:
        broken.setattr(Planner, "match", None)
        for number in range(5):
            engine.ask(f"{number}", prompt(2, seed=number))
    assert caplog.text.count("get_num_new_matched_tokens failed") == 3
    assert engine.counts()["errors"] == 5
