"""What an engine needs to know to use the store: options on its command line, and one variable.

The server writes them, and the connector reads them in the engine's processes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tiers.prefix_kv.store import StoreConfig

KEY_VARIABLE = "PREFIX_KV_KEY"
"""Of the environment; it holds the key in hexadecimal, since others can read command lines."""
HASH_ALGORITHM = "sha256_cbor"
"""The engine's hash of blocks: the same in every process, neither random nor of pickled objects."""
WARM = {"prefix_kv": "warm"}
"""The `kv_transfer_params` of a request of ours that only fills the engine's cache."""
DISK_TOKENS = "prefix_disk_tokens"
"""The field of an answer's `kv_transfer_params` with the number of tokens that were loaded."""


@dataclass(frozen=True, slots=True)
class ConnectorOptions:
    """Options of the connector of one engine."""

    folder: str
    max_bytes: int
    model: str
    """Name of the model, in labels and counters."""
    weights: str
    """Fingerprint of the weights' contents."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the adapters' contents, by name."""
    ttl_s: float = 7 * 86400
    store_after: int = 2
    """How often a prefix must have been requested lately until it is stored."""
    min_tokens: int = 256
    """The least that a load is worth."""

    def engine_options(self) -> dict[str, Any]:
        """Return vLLM's options with which it uses the store."""
        return {
            "prefix_caching_hash_algo": HASH_ALGORITHM,
            "kv_transfer_config": {
                "kv_connector": "PrefixConnector",
                "kv_connector_module_path": "tiers.prefix_kv.engine.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": asdict(self),
            },
        }

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Self:
        """Read the `kv_connector_extra_config` of `engine_options`.

        Raises:
            TypeError: an option is missing or unknown.
        """
        return cls(**extra)

    def store(self, environment: Mapping[str, str]) -> StoreConfig:
        """Return how the store is opened.

        Raises:
            ValueError: the key in the environment isn't hexadecimal.
        """
        key = environment.get(KEY_VARIABLE)
        return StoreConfig(
            Path(self.folder), self.max_bytes, bytes.fromhex(key) if key else None, self.ttl_s
        )
