"""The policy and the small modules: counters, options."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.prefix_kv import policy
from tiers.prefix_kv.counters import COUNTERS, EngineCounts
from tiers.prefix_kv.options import HASH_ALGORITHM, KEY_VARIABLE, ConnectorOptions
from tiers.prefix_kv.store import StoreConfig

PRIORITIES = st.floats(0, 1e12)


@pytest.mark.parametrize(
    ("counts", "due"), [([], 0), ([1], 0), ([2, 2, 1], 2), ([3, 1, 3], 1), ([2, 2], 2)]
)
def test_blocks_are_due_as_far_as_each_was_requested_often_enough(counts, due: int) -> None:
    assert policy.due(counts, 2) == due


@given(PRIORITIES, st.lists(st.tuples(st.integers(0, 15), PRIORITIES), max_size=8))
def test_no_parent_ends_below_its_child_and_none_sinks(age: float, blocks) -> None:
    counts, held = [count for count, _ in blocks], [before for _, before in blocks]
    new = list(policy.raised(age, counts, held))[::-1]
    assert new == sorted(new, reverse=True)
    for priority, count, before in zip(new, counts, held, strict=True):
        assert priority >= max(before, policy.priority(age, count))


@given(st.lists(st.tuples(PRIORITIES, *[st.integers(0, 2**32 - 1)] * 3), min_size=2, max_size=2))
def test_keys_sort_by_priority_then_touch_then_the_deepest_first(pair) -> None:
    keys = [policy.order_key(*each) for each in pair]
    ranks = [(priority, touch, -depth, sequence) for priority, touch, depth, sequence in pair]
    assert (keys[0] < keys[1]) is (ranks[0] < ranks[1])
    assert [policy.depth_of(key) for key in keys] == [each[2] for each in pair]
    assert policy.is_order_key(keys[0])
    assert not policy.is_order_key(keys[0][1:])


@pytest.mark.parametrize(("blocks", "keys"), [(1, 2**14), (10_000, 2**17), (10**9, 2**20)])
def test_the_sketch_grows_with_the_store_within_bounds(blocks: int, keys: int) -> None:
    assert policy.new_sketch(blocks).capacity == keys


def test_counts_are_taken_once() -> None:
    counts = EngineCounts()
    counts.add("hits")
    counts.add("hits", 2)
    counts.add("load_seconds", 0.5)
    assert counts.take() == {"hits": 3, "load_seconds": 0.5}
    assert counts.take() == {}
    assert set(COUNTERS) >= {"hits", "load_seconds"}


def test_options_survive_the_command_line_without_the_key() -> None:
    options = ConnectorOptions("/kv", 2**30, "m", "f" * 64, {"finch": "a" * 64}, 60.0, 1, 128)
    made = options.engine_options()
    assert made["prefix_caching_hash_algo"] == HASH_ALGORITHM
    extra = made["kv_transfer_config"]["kv_connector_extra_config"]
    assert ConnectorOptions.of(extra) == options
    with pytest.raises(TypeError):
        ConnectorOptions.of({**extra, "unknown": 1})
    with pytest.raises(TypeError):
        ConnectorOptions.of({})
    assert options.store({}) == StoreConfig(Path("/kv"), 2**30, None, 60.0)
    assert options.store({KEY_VARIABLE: "ab" * 32}).key == b"\xab" * 32
    with pytest.raises(ValueError, match="hex"):
        options.store({KEY_VARIABLE: "no key"})
