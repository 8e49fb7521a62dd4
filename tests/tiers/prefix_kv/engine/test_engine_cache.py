"""Where a block's bytes are in the engine's cache, for all layouts that vLLM has."""

from dataclasses import replace

import numpy as np
import pytest

from tiers.prefix_kv.engine.host_copies import HostCopies

from .test_loads import LAYOUTS

pytestmark = pytest.mark.engine
BLOCKS = 5


def planned(tmp_path, layout, spec=None):
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    from .engine import LAYERS, SPEC, vllm_config

    spec = spec or SPEC
    config = vllm_config(tmp_path)
    config.cache_config.kv_cache_layout = layout
    return get_kv_cache_config_from_groups(
        config, [KVCacheGroupSpec(list(LAYERS), spec)],
        available_memory=BLOCKS * len(LAYERS) * spec.page_size_bytes,
    )  # fmt: skip


def allocated(cache, layout):
    import torch
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    return allocate_kv_cache(cache, torch.device("cpu"), KVCacheLayout[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_is_each_layers_page_and_nothing_else(tmp_path, layout):
    from tiers.prefix_kv.engine.engine_cache import regions

    cache = planned(tmp_path, layout)
    views = allocated(cache, layout)
    found = regions(views, cache)
    copies = HostCopies([region.numpy() for region in found])
    (memory,) = copies.staging(1)
    for view in views.values():
        view[1] = 1
        view[3] = 3
    copies.save(1, memory)
    assert bytes(memory) == b"\1" * copies.block_bytes
    for view in views.values():
        view[:] = 9
    copies.load(memory, 3)
    for view in views.values():
        assert (view[3] == 1).all()
        assert (view[[0, 1, 2, 4]] == 9).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_where_vllm_says(tmp_path, layout):
    from tiers.prefix_kv.engine.engine_cache import regions

    cache = planned(tmp_path, layout)
    views = allocated(cache, layout)
    memory = np.zeros(cache.kv_cache_tensors[0].size, np.uint8)
    base = next(iter(views.values())).untyped_storage().data_ptr()
    covered: dict[int, set[int]] = {block: set() for block in range(BLOCKS)}
    for region in regions(views, cache):
        for block in range(BLOCKS):
            at = region[block].data_ptr() - base
            covered[block] |= set(range(at, at + region.shape[1]))
    for block in range(BLOCKS):
        expected: set[int] = set()
        for view in views.values():
            page = view[block]
            offsets = np.zeros(page.shape, np.int64)
            for axis, stride in enumerate(page.stride()):
                shape = [-1 if other == axis else 1 for other in range(page.dim())]
                offsets += (np.arange(page.shape[axis]) * stride).reshape(shape)
            expected |= set((offsets + page.data_ptr() - base).ravel().tolist())
        assert covered[block] == expected
    for tensor in cache.kv_cache_tensors:
        for number, layer in enumerate(tensor.layers):
            for block in range(BLOCKS):
                at = tensor.offset + number * tensor.layer_stride + block * tensor.block_stride
                assert views[layer][block].data_ptr() - base == at
                assert at in covered[block]
    assert len(set().union(*covered.values())) == len(memory)


def test_layers_that_share_memory_are_copied_once(tmp_path):
    from tiers.prefix_kv.engine.engine_cache import regions

    cache = planned(tmp_path, "LBHNC")
    views = allocated(cache, "LBHNC")
    views["shared"] = views["b"]
    assert len(regions(views, cache)) == 2


def test_pages_with_gaps_are_not_understood(tmp_path):
    from tiers.prefix_kv.engine.engine_cache import NotUnderstoodError, regions

    from .engine import SPEC

    cache = planned(tmp_path, "BLHNC")
    cache.kv_cache_groups[0].kv_cache_spec = replace(SPEC, num_kv_heads=1)
    with pytest.raises(NotUnderstoodError, match="bytes in memory rather than"):
        regions(allocated(planned(tmp_path, "BLHNC"), "BLHNC"), cache)


def test_memory_of_another_size_is_not_understood(tmp_path):
    from tiers.prefix_kv.engine.engine_cache import NotUnderstoodError, regions

    cache = planned(tmp_path, "LBHNC")
    views = allocated(cache, "LBHNC")
    for tensor in cache.kv_cache_tensors:
        tensor.layer_stride *= 2
    with pytest.raises(NotUnderstoodError, match="of another size than its blocks"):
        regions(views, cache)
