"""What makes a scope: each fact that changes blocks' bytes or meaning makes another."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tiers.prefix_kv.scope import adapted, scope_of_facts

pytestmark = pytest.mark.engine


class Facts:
    """What an engine says of itself, to be changed by a test."""

    def __init__(self, folder) -> None:
        from .engine import kv_config, vllm_config

        self.config = vllm_config(folder)
        self.cache = kv_config(self.config, 8)
        self.layers = self.config.compilation_config.static_forward_context
        self.layers["a"] = SimpleNamespace(
            attn_backend=SimpleNamespace(get_name=lambda: "CPU_ATTN")
        )

    def scope(self) -> bytes:
        from tiers.prefix_kv.engine.engine_cache import scope_facts

        facts = scope_facts(self.config, self.cache)
        return scope_of_facts(json.loads(json.dumps(facts)) | {"weights": "w"})


def spec(facts: Facts, **changed: Any) -> None:
    from dataclasses import replace

    (group,) = facts.cache.kv_cache_groups
    group.kv_cache_spec = replace(group.kv_cache_spec, **changed)


def tensor(facts: Facts) -> Any:
    return facts.cache.kv_cache_tensors[0]


CHANGES: dict[str, Callable[[Facts, pytest.MonkeyPatch], Any]] = {
    "vllm version": lambda facts, patch: patch.setattr("vllm.__version__", "0.33.0"),
    "torch version": lambda facts, patch: patch.setattr("torch.__version__", "9"),
    "dtype": lambda facts, patch: setattr(
        facts.config.model_config, "dtype", __import__("torch").bfloat16
    ),
    "quantization": lambda facts, patch: setattr(
        facts.config.model_config, "quantization", "fp8"
    ),
    "rope": lambda facts, patch: facts.config.model_config.hf_config.update(
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    ),
    "context": lambda facts, patch: facts.config.model_config.hf_config.update(
        {"max_position_embeddings": 8192}
    ),
    "load format": lambda facts, patch: setattr(
        facts.config.load_config, "load_format", "dummy"
    ),
    "loader's options": lambda facts, patch: setattr(
        facts.config.load_config, "model_loader_extra_config", {"tensorizer_uri": "x"}
    ),
    "preparation of media": lambda facts, patch: setattr(
        facts.config.model_config, "multimodal_config",
        SimpleNamespace(mm_processor_kwargs={"max_pixels": 1}),
    ),
    "max model len": lambda facts, patch: setattr(
        facts.config.model_config, "max_model_len", 1024
    ),
    # One that vLLM takes on any machine.
    "cache dtype": lambda facts, patch: setattr(
        facts.config.cache_config, "cache_dtype", "bfloat16"
    ),
    "block size": lambda facts, patch: spec(facts, block_size=32),
    "heads": lambda facts, patch: spec(facts, num_kv_heads=1),
    "quantization of keys": lambda facts, patch: spec(
        facts, dtype=__import__("torch").int8
    ),
    "hash algorithm": lambda facts, patch: setattr(
        facts.config.cache_config, "prefix_caching_hash_algo", "sha256"
    ),
    "hash seed": lambda facts, patch: patch.setenv("PYTHONHASHSEED", "1"),
    "layout": lambda facts, patch: setattr(facts.cache, "kv_cache_layout", "BLHNC"),
    "layer stride": lambda facts, patch: setattr(tensor(facts), "layer_stride", 1024),
    "block stride": lambda facts, patch: setattr(tensor(facts), "block_stride", 4096),
    "layer names": lambda facts, patch: setattr(tensor(facts), "layers", ["b", "a"]),
    "backend": lambda facts, patch: setattr(
        facts.layers["a"].attn_backend, "get_name", lambda: "OTHER"
    ),
    "packing": lambda facts, patch: patch.setattr(
        "vllm.v1.attention.backends.cpu_attn._get_attn_isa", lambda *args: "other"
    ),
    "instructions": lambda facts, patch: patch.setattr(
        "torch.backends.cpu.get_cpu_capability", lambda: "OTHER"
    ),
    "tensor parallelism": lambda facts, patch: setattr(
        facts.config.parallel_config, "tensor_parallel_size", 2
    ),
    "pipeline parallelism": lambda facts, patch: setattr(
        facts.config.parallel_config, "pipeline_parallel_size", 2
    ),
    "rank": lambda facts, patch: setattr(facts.config.parallel_config, "rank", 1),
    "draft": lambda facts, patch: setattr(
        facts.config, "speculative_config",
        SimpleNamespace(method="ngram", model=None, num_speculative_tokens=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_fact_makes_another_scope(tmp_path, monkeypatch, change):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    before = Facts(tmp_path).scope()
    facts = Facts(tmp_path)
    assert facts.scope() == before
    CHANGES[change](facts, monkeypatch)
    assert facts.scope() != before


def test_the_size_of_the_cache_does_not_matter(tmp_path):
    from .engine import kv_config

    facts = Facts(tmp_path)
    before = facts.scope()
    facts.cache = kv_config(facts.config, 80)
    assert facts.scope() == before


def test_where_the_weights_are_does_not_matter(tmp_path):
    assert Facts(tmp_path / "here").scope() == Facts(tmp_path / "there").scope()


def test_weights_and_adapters_make_scopes_of_their_own():
    scopes = [scope_of_facts({"weights": name}) for name in ("one", "two")]
    scopes += [adapted(scopes[0], name) for name in ("one", "two")]
    assert len(set(scopes)) == 4


def test_a_fact_that_has_no_one_form_is_refused():
    with pytest.raises(TypeError):
        scope_of_facts({"weights": object()})
