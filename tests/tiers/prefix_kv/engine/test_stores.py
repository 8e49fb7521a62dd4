"""What an engine stores, and when."""

import errno
import threading

import pytest

from tests.waiting import HANGS_S
from tiers.prefix_kv.data_file import DataFile
from tiers.prefix_kv.engine import transfers
from tiers.prefix_kv.store import PrefixStore

from .prompts import prompt

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("store_after", [1, 2, 3])
def test_a_prefix_is_stored_when_it_was_asked_for_often_enough(new_engine, store_after):
    engine = new_engine(store_after=store_after)
    for number in range(1, 5):
        # Only the first time it is computed; later the engine's own cache has it.
        engine.ask(f"{number}", prompt(10))
        engine.drain()
        assert engine.store.statistics().blocks == (10 if number >= store_after else 0)
    assert engine.counts(engine.worker)["stored_blocks"] == 10
    assert new_engine().ask("warm", prompt(10)) == 1


def test_only_the_shared_beginning_is_stored(new_engine):
    engine = new_engine(store_after=2)
    engine.ask("one", prompt(6) + prompt(4, seed=1))
    engine.ask("two", prompt(6) + prompt(4, seed=2))
    engine.drain()
    assert engine.store.statistics().blocks == 6


def test_generated_tokens_are_not_stored(new_engine):
    engine = new_engine()
    engine.ask("long", prompt(2), max_tokens=50)
    engine.drain()
    assert engine.store.statistics().blocks == 2


def test_counts_outlive_the_engine(new_engine):
    first = new_engine(store_after=2)
    first.ask("one", prompt(10))
    first.close()
    second = new_engine(store_after=2)
    second.ask("two", prompt(10))
    second.drain()
    assert second.store.statistics().blocks == 10


def test_what_does_not_fit_into_staging_memory_follows_in_later_steps(new_engine, monkeypatch):
    monkeypatch.setattr(transfers, "STAGING_BYTES", 0)
    engine = new_engine()
    engine.add("long", prompt(10), max_tokens=8)

    def are_over() -> bool:
        ordered = 4 + engine.side._saves_over[0] - engine.planner.room
        return engine.worker.saver.over == ordered

    while not engine.requests["long"].is_finished():
        engine.step()
        engine.wait_for(are_over)
    assert engine.store.statistics().blocks == 10
    assert "dropped_blocks" not in engine.counts() | engine.counts(engine.worker)


def test_what_finds_no_staging_memory_before_the_end_is_dropped(new_engine, monkeypatch):
    writes, write = threading.Event(), PrefixStore.write
    monkeypatch.setattr(transfers, "STAGING_BYTES", 0)
    monkeypatch.setattr(PrefixStore, "write", lambda *args: writes.wait(HANGS_S) and write(*args))
    engine = new_engine()
    engine.ask("many", prompt(10))
    assert engine.counts()["dropped_blocks"] == 6
    writes.set()
    engine.drain()
    assert engine.store.statistics().blocks == 4
    assert new_engine().ask("warm", prompt(10)) == 161 - 64


def test_the_engine_may_reuse_blocks_while_they_are_stored(new_engine, monkeypatch):
    writes, write = threading.Event(), PrefixStore.write
    monkeypatch.setattr(PrefixStore, "write", lambda *args: writes.wait(HANGS_S) and write(*args))
    engine = new_engine(blocks=16)
    engine.ask("first", prompt(10))
    engine.ask("second", prompt(14, seed=1))
    writes.set()
    # The new engine checks each block that it loads.
    second = new_engine()
    assert second.ask("warm", prompt(10)) == 1
    assert second.ask("warm too", prompt(14, seed=1)) == 1


def test_a_request_may_be_preempted_while_it_is_stored(new_engine, monkeypatch):
    writes, write = threading.Event(), PrefixStore.write
    monkeypatch.setattr(PrefixStore, "write", lambda *args: writes.wait(HANGS_S) and write(*args))
    engine = new_engine(blocks=32)
    engine.add("first", prompt(20), max_tokens=2)
    engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    writes.set()
    assert new_engine(blocks=32).ask("warm", prompt(20)) == 1


def test_a_full_disk_pauses_stores(new_engine, monkeypatch, caplog):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(DataFile, "write", fail)
        engine = new_engine()
        engine.ask("first", prompt(10))
        engine.drain()
    counts = engine.counts(engine.worker)
    assert counts["dropped_blocks"] == 10
    assert counts["errors"] >= 1
    assert "No space left" in caplog.text
    engine.ask("second", prompt(10, seed=1))
    engine.drain()
    assert engine.counts(engine.worker)["dropped_blocks"] == 10
    # It is tried again after a while.
    engine.worker.saver._paused_until = 0.0
    engine.ask("third", prompt(10, seed=2))
    engine.drain()
    assert engine.store.statistics().blocks == 10


def test_a_shutdown_stores_what_is_staged(new_engine, monkeypatch):
    begun, goes_on, write = threading.Event(), threading.Event(), PrefixStore.write

    def wait(*args):
        begun.set()
        assert goes_on.wait(HANGS_S)
        return write(*args)

    monkeypatch.setattr(PrefixStore, "write", wait)
    engine = new_engine()
    engine.ask("first", prompt(10))
    assert begun.wait(HANGS_S)
    store = engine.store
    goes_on.set()
    engine.close()
    assert store.statistics().blocks == 10
    assert not engine.worker_connector.is_on
    engine.close()


@pytest.mark.parametrize(
    "others",
    [
        lambda: {"mm_features": [image()]},
        lambda: {"prompt_embeds": embeds()},
    ],
    ids=["image", "embeddings"],
)
def test_what_is_more_than_tokens_is_not_plain(new_engine, others):
    engine = new_engine()
    engine.connector.on_new_request(request := request_of(prompt(4), **others()))
    chain = engine.planner._requests[request.request_id].chain
    assert not chain.is_plain
    engine.connector.on_new_request(plain := request_of(prompt(4), name="plain"))
    assert engine.planner._requests[plain.request_id].chain.is_plain


def test_a_prompt_without_tokens_is_left_alone(new_engine):
    engine = new_engine()
    engine.connector.on_new_request(request := request_of(None, prompt_embeds=embeds()))
    assert request.request_id not in engine.planner._requests


def image():
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    place = PlaceholderRange(offset=0, length=16)
    return MultiModalFeatureSpec(data=None, modality="image", identifier="i", mm_position=place)


def embeds():
    import torch

    return torch.zeros(65, 8)


def request_of(tokens, name="r", **others):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from .engine import block_hasher

    return Request(
        request_id=name, prompt_token_ids=tokens, sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None, block_hasher=block_hasher(), **others,
    )  # fmt: skip
