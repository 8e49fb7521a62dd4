"""Section `tiers.prefix` of the configuration, and what it takes of the models."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import ByteSize, Field

from server.config.base import FilePath, PositiveSeconds, Section
from server.config.models import ModelConfig
from tiers.prefix_kv.options import HASH_ALGORITHM
from tiers.prefix_kv.store import MIN_BYTES


class PrefixTierConfig(Section):
    """The prefix tier: what engines of ours have computed of prompts' beginnings, on disk.

    There is none by default.
    """

    path: Annotated[FilePath | None, Field(examples=["~/.cache/tierserve/prefix"])] = None
    """Folder of the blocks, by default `tierserve/prefix` in the cache folder. Servers and engines
    of one machine may share it. The key of `tiers.disk` encrypts it, too; without a disk tier it
    isn't encrypted."""
    max_bytes: Annotated[ByteSize, Field(ge=MIN_BYTES)] = ByteSize(8 * 1024**3)
    """Size limit of all its files."""
    store_after: Annotated[int, Field(ge=1, le=15)] = 2
    """How often a beginning must have been asked for lately until it is stored; 1 stores all."""
    ttl_s: PositiveSeconds = 7 * 24 * 3600
    """Seconds that a block is kept."""
    min_tokens: Annotated[int, Field(ge=1)] = 256
    """The fewest tokens of a prompt that are worth loading."""
    warm_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest part of an engine's own cache that is filled after its start; 0 fills none."""


_IsWrong = Callable[[Any], bool]
# Options of vLLM, which of their values exclude the tier, and what would be right.
_EXCLUDED: Mapping[str, tuple[_IsWrong, str]] = {
    "kv_transfer_config": (lambda value: value is not None, "left out"),
    "kv_offloading_size": (lambda value: value is not None, "left out"),
    "prefix_caching_hash_algo": (lambda value: value != HASH_ALGORITHM, HASH_ALGORITHM),
    "enable_prefix_caching": (lambda value: value is False, "true"),
    "no_enable_prefix_caching": (lambda value: value is True, "left out"),
}


_ALLOCATOR, _EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""A variable of torch, and what vLLM refuses in it beside any store of prefixes."""


def excluded_options(
    models: Mapping[str, ModelConfig], environment: Mapping[str, str]
) -> list[str]:
    """Return a line for each option of our engines that can't be beside the prefix tier.

    `environment` is that of the server, which engines inherit.
    """
    mistakes = []
    for name, model in models.items():
        engine, args = f"models.{name}.engine", model.engine.args
        mistakes += [
            f"{engine}.args.{option}: should be {right} while tiers.prefix is on"
            for option, (is_wrong, right) in _EXCLUDED.items()
            if option in args and is_wrong(args[option])
        ]
        env = {**environment, **model.engine.env}
        if not model.upstreams and _EXPANDABLE in env.get(_ALLOCATOR, ""):
            should = f"should be without {_EXPANDABLE} while tiers.prefix is on"
            mistakes.append(f"{engine}.env.{_ALLOCATOR}: {should}")
    return mistakes
