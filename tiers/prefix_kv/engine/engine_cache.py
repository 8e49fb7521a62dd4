"""How vLLM 0.32 keeps keys and values, and what changes their bytes or meaning.

A cache that isn't known to be one table of blocks of full attention isn't understood, so that no
byte is copied to where it doesn't belong.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from tiers.prefix_kv.options import HASH_ALGORITHM

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor


class NotUnderstoodError(Exception):
    """The engine keeps its cache in a way that the connector doesn't know."""


def require_known(config: "VllmConfig", cache: "KVCacheConfig") -> int:
    """Return the tokens of a block, if the engine has one table of blocks of full attention.

    Raises:
        NotUnderstoodError: it hasn't.
    """
    options, parallel = config.cache_config, config.parallel_config
    if not options.enable_prefix_caching:
        raise NotUnderstoodError("the engine's prefix cache is off (enable_prefix_caching)")
    if (algorithm := options.prefix_caching_hash_algo) != HASH_ALGORITHM:
        raise NotUnderstoodError(
            f"prefix_caching_hash_algo should be {HASH_ALGORITHM}, not {algorithm}"
        )
    if parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1:
        raise NotUnderstoodError("context parallelism spreads blocks over workers")
    if (groups := len(cache.kv_cache_groups)) != 1:
        raise NotUnderstoodError(f"the model has {groups} groups of caches")
    (group,) = cache.kv_cache_groups
    spec = group.kv_cache_spec
    # Their subclasses may keep other blocks in a request's table.
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        raise NotUnderstoodError(f"the model's cache is of the kind {type(spec).__name__}")
    if group.is_eagle_group or group.host_resident:
        raise NotUnderstoodError("the model's cache is of draft layers, or in two memories")
    if cache.hash_block_size not in (None, spec.block_size):
        raise NotUnderstoodError("hashes and blocks are of different numbers of tokens")
    return int(spec.block_size)


def regions(caches: dict[str, torch.Tensor], cache: "KVCacheConfig") -> list[torch.Tensor]:
    """Return the cache's memory as tables of bytes with one row for each block.

    Raises:
        NotUnderstoodError: the tables don't hold each layer's page of a block.
    """
    found: dict[int, torch.Tensor] = {}
    for tensor in cache.kv_cache_tensors:
        name = next((name for name in tensor.layers if name in caches), None)
        if name is not None:
            for region in _regions_of(caches[name], tensor, cache.num_blocks):
                # Layers may share their memory.
                found.setdefault(region.data_ptr(), region)
    (group,) = cache.kv_cache_groups
    expected = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    if (size := sum(region.shape[1] for region in found.values())) != expected:
        raise NotUnderstoodError(f"a block has {size} bytes in memory rather than {expected}")
    return list(found.values())


def _regions_of(
    layer: torch.Tensor, tensor: "KVCacheTensor", blocks: int
) -> Iterator[torch.Tensor]:
    storage = layer.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=layer.device).set_(storage)
    block_bytes = tensor.block_stride
    start, span = 0, blocks * block_bytes
    if tensor.layer_stride >= span:
        # Layers are outermost, each with a run of pages for all blocks.
        start, span = tensor.offset, len(tensor.layers) * tensor.layer_stride
    if memory.numel() < start + span or span % (blocks * block_bytes):
        raise NotUnderstoodError("a layer's memory is of another size than its blocks")
    yield from memory[start : start + span].view(-1, blocks, block_bytes)


def scope_facts(config: "VllmConfig", cache: "KVCacheConfig") -> dict[str, Any]:
    """Return all that changes the bytes of blocks, or what they mean, but for the weights."""
    model, options, parallel = config.model_config, config.cache_config, config.parallel_config
    (group,) = cache.kv_cache_groups
    loading = config.load_config
    hash_fn = get_hash_fn_by_name(options.prefix_caching_hash_algo)
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "architecture": _digest_of(model.hf_config.to_dict()),
        "loading": [str(loading.load_format), str(loading.model_loader_extra_config)],
        "media": str(getattr(model.multimodal_config, "mm_processor_kwargs", None)),
        "max_model_len": model.max_model_len,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "cache_dtype": options.cache_dtype,
        "hash": options.prefix_caching_hash_algo,
        "hash_seed": resolve_none_hash_seed(hash_fn),
        "block_tokens": group.kv_cache_spec.block_size,
        "spec": repr(group.kv_cache_spec),
        "layout": cache.kv_cache_layout,
        "tensors": [_placement(tensor, cache.num_blocks) for tensor in cache.kv_cache_tensors],
        "backends": _backends(config),
        "device": _device(config),
        "parallel": [
            parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.rank,
        ],
        "speculative": _speculative(config),
    }  # fmt: skip


def is_on_gpu() -> bool:
    """Return whether the cache is on a GPU, which computes beside our copies."""
    return bool(current_platform.is_cuda_alike())


def preferred_layout() -> str | None:
    """Return the layout in which each block is one run of bytes, for GPUs."""
    return "BLHNC" if is_on_gpu() else None


def _placement(tensor: "KVCacheTensor", blocks: int) -> list[Any]:
    """Describe where pages are, without what depends on the number of blocks."""
    is_outermost = tensor.layer_stride >= blocks * tensor.block_stride
    stride = tensor.layer_stride // blocks if is_outermost else tensor.layer_stride
    return [tensor.layers, is_outermost, stride, tensor.block_stride]


def _backends(config: "VllmConfig") -> dict[str, str]:
    """Return the attention backends of the layers."""
    layers = config.compilation_config.static_forward_context
    return {
        name: layer.attn_backend.get_name()
        for name, layer in layers.items()
        if hasattr(layer, "attn_backend")
    }


def _device(config: "VllmConfig") -> list[str]:
    """Return the device, and the instructions for which a CPU's keys are packed."""
    if not current_platform.is_cpu():
        return [current_platform.get_device_name()]
    # Keys are packed for the instructions that this function chooses.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, options = config.model_config, config.cache_config
    packing = _get_attn_isa(
        model.dtype, options.block_size, model.get_head_size(), options.cache_dtype
    )
    return ["cpu", packing, torch.backends.cpu.get_cpu_capability()]


def _speculative(config: "VllmConfig") -> list[Any] | None:
    draft = config.speculative_config
    if draft is None:
        return None
    return [draft.method, str(draft.model), draft.num_speculative_tokens]


def _digest_of(described: dict[str, Any]) -> str:
    # Where the weights are doesn't matter.
    facts = {name: value for name, value in described.items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
