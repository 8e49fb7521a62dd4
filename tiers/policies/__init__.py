"""Eviction policies by name: which entry leaves the memory tier when room is needed.

A new policy is a new file here, with one class that is named in `POLICIES`.
"""

from tiers.policies.adaptive import Adaptive
from tiers.policies.arc import ARC
from tiers.policies.base import Policy
from tiers.policies.fifo import FIFO
from tiers.policies.lfu import LFU
from tiers.policies.lru import LRU
from tiers.policies.s3fifo import S3FIFO
from tiers.policies.sieve import SIEVE
from tiers.policies.wtinylfu import WTinyLFU

POLICIES: dict[str, type[Policy]] = {
    policy.NAME: policy for policy in (Adaptive, ARC, FIFO, LFU, LRU, S3FIFO, SIEVE, WTinyLFU)
}

DEFAULT = Adaptive.NAME
"""Near the best on every trace, nothing to set, and not behind LRU: see the figures that
scripts/bench/policies.py prints."""

__all__ = [
    "ARC",
    "DEFAULT",
    "FIFO",
    "LFU",
    "LRU",
    "POLICIES",
    "S3FIFO",
    "SIEVE",
    "Adaptive",
    "Policy",
    "WTinyLFU",
]
