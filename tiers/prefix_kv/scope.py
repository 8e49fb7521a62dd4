"""The scope of blocks: a digest of all that changes their bytes, or what these mean.

Blocks are exchanged only within a scope, so an engine never takes those of other weights, of
another layout, or of a processor that packs them otherwise.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from tiers.prefix_kv.record import FORMAT, SCOPE_BYTES


def scope_of_facts(facts: Mapping[str, Any]) -> bytes:
    """Return the scope that the facts make; any fact that differs makes another.

    Raises:
        TypeError: a fact isn't JSON.
    """
    described = {"format": FORMAT, **facts}
    return _digest(json.dumps(described, sort_keys=True, allow_nan=True).encode())


def adapted(scope: bytes, fingerprint: str) -> bytes:
    """Return the scope of what an adapter with this fingerprint makes of a scope's model."""
    return _digest(scope + fingerprint.encode())


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=SCOPE_BYTES).digest()
