"""Engines whose cache the connector doesn't know: it leaves them alone, and says so once."""

from dataclasses import replace

import pytest

from .prompts import prompt

pytestmark = pytest.mark.engine


def groups(kind: str):
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheGroupSpec,
        RSWASpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    )

    from .engine import LAYERS, SPEC, TOKENS

    window = SlidingWindowSpec(
        block_size=TOKENS, num_kv_heads=2, head_size=32, dtype=torch.uint8, sliding_window=64
    )
    other = FullAttentionSpec(block_size=TOKENS, num_kv_heads=2, head_size=32, dtype=torch.uint8)
    reference = RSWASpec(
        block_size=TOKENS, num_kv_heads=2, head_size=32, dtype=torch.uint8, rswa_window=64
    )
    uniform = UniformTypeKVCacheSpecs(
        block_size=TOKENS, kv_cache_specs={"a": SPEC, "b": replace(other, num_kv_heads=1)}
    )
    return {
        "two groups": [KVCacheGroupSpec(["a"], SPEC), KVCacheGroupSpec(["b"], window)],
        "sliding window": [KVCacheGroupSpec(list(LAYERS), window)],
        "reference window": [KVCacheGroupSpec(list(LAYERS), reference)],
        "draft layers": [KVCacheGroupSpec(list(LAYERS), SPEC, is_eagle_group=True)],
        "pages of two sizes": [KVCacheGroupSpec(list(LAYERS), uniform)],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("two groups", "the model has 2 groups of caches"),
        ("sliding window", "of the kind SlidingWindowSpec"),
        ("reference window", "of the kind RSWASpec"),
        ("draft layers", "draft layers"),
        ("pages of two sizes", "of the kind UniformTypeKVCacheSpecs"),
    ],
)
def test_caches_of_other_kinds_are_left_alone(new_engine, caplog, kind, reason):
    if kind in {"sliding window", "reference window", "pages of two sizes"}:
        refused(groups(kind), reason)
        return
    engine = new_engine(groups=groups(kind))
    assert engine.ask("cold", prompt(6)) == 97
    assert_said_once(engine, caplog, reason)


def refused(kv_groups, reason):
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from tiers.prefix_kv.engine.engine_cache import NotUnderstoodError, require_known

    cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=kv_groups)
    with pytest.raises(NotUnderstoodError, match=reason):
        require_known(known_config(), cache)


def known_config():
    from types import SimpleNamespace

    return SimpleNamespace(
        cache_config=SimpleNamespace(
            enable_prefix_caching=True, prefix_caching_hash_algo="sha256_cbor"
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("enable_prefix_caching", False, "enable_prefix_caching"),
        ("prefix_caching_hash_algo", "sha256", "should be sha256_cbor, not sha256"),
    ],
)
def test_other_hashes_are_left_alone(new_engine, caplog, option, value, reason):
    engine = new_engine(cache={option: value})
    assert engine.ask("cold", prompt(6)) == 97
    assert_said_once(engine, caplog, reason)


@pytest.mark.parametrize("size", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_left_alone(size):
    from tiers.prefix_kv.engine.engine_cache import NotUnderstoodError, require_known

    config = known_config()
    setattr(config.parallel_config, size, 2)
    with pytest.raises(NotUnderstoodError, match="context parallelism"):
        require_known(config, None)


def test_hashes_of_parts_of_blocks_are_left_alone():
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from tiers.prefix_kv.engine.engine_cache import NotUnderstoodError, require_known

    from .engine import LAYERS, SPEC

    cache = KVCacheConfig(
        num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), SPEC)],
        hash_block_size=8,
    )  # fmt: skip
    with pytest.raises(NotUnderstoodError, match="different numbers of tokens"):
        require_known(known_config(), cache)


def test_a_worker_that_is_missing_turns_it_off(new_engine, caplog):
    engine = new_engine()
    engine.side.close()
    engine.connector._scheduler = None
    engine.connector.set_xfer_handshake_metadata_pp_aware({})
    assert engine.ask("cold", prompt(6)) == 97
    assert caplog.text.count("a worker has no store") == 1
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)


def assert_said_once(engine, caplog, reason):
    said = [each for each in caplog.messages if "neither loaded nor stored" in each]
    assert len(said) == 1
    assert reason in said[0]
    assert not engine.connector.is_on
    assert engine.worker_connector.get_handshake_metadata() is None


def test_its_logs_are_shown_as_vllms(monkeypatch):
    import logging

    from tiers.prefix_kv.engine.connector import _show_logs

    own = logging.getLogger("tiers")
    monkeypatch.setattr(own, "handlers", [])
    monkeypatch.setattr(own, "propagate", True)
    level = own.level
    _show_logs()
    assert own.handlers is logging.getLogger("vllm").handlers
    assert not own.propagate
    own.setLevel(level)
