"""The options with which an engine of ours keeps prefix blocks in the prefix tier."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from server.config.prefix_tier import PrefixTierConfig
from server.engine.identity import fingerprint, weights_fingerprint
from server.engine.weights import Weights
from tiers.prefix_kv.options import KEY_VARIABLE, ConnectorOptions

_NONE: Mapping[str, Any] = {}


class PrefixOptions(NamedTuple):
    """What engines need to know of the prefix tier."""

    config: PrefixTierConfig
    key: bytes | None
    """Encrypts the blocks."""

    def environment(self) -> dict[str, str]:
        """Return the variables of an engine's environment, one of which may be a secret."""
        return {} if self.key is None else {KEY_VARIABLE: self.key.hex()}

    def read(self, model: str, weights: Weights) -> Mapping[str, Any]:
        """Return vLLM's options for the model of that name. It reads the weights, and may block.

        There are none for a model to which vLLM attaches no store.
        """
        config = self.config
        if config.path is None or _has_encoder(weights.folder):
            return _NONE
        return ConnectorOptions(
            folder=str(config.path),
            max_bytes=config.max_bytes,
            model=model,
            weights=weights_fingerprint(weights),
            adapters={name: fingerprint(path) for name, path in weights.adapters.items()},
            ttl_s=config.ttl_s,
            store_after=config.store_after,
            min_tokens=config.min_tokens,
        ).engine_options()


def adapters_in(options: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the fingerprints of the adapters in what `read` returned, by name."""
    if not options:
        return _NONE
    return ConnectorOptions.of(options["kv_transfer_config"]["kv_connector_extra_config"]).adapters


def _has_encoder(folder: Path | None) -> bool:
    """Return whether the model encodes prompts first, as far as its files are on this machine."""
    if folder is None:
        return False
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        # vLLM says what is wrong with it.
        return False
    return isinstance(config, dict) and config.get("is_encoder_decoder") is True
