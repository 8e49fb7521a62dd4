"""Eviction policies by name: which entry leaves the memory tier when room is needed.

A new policy is a new file here with one subclass of `Policy`, which `POLICIES` lists.
"""

from tiers.policies.arc import ARC
from tiers.policies.base import Policy
from tiers.policies.fifo import FIFO
from tiers.policies.lfu import LFU
from tiers.policies.lru import LRU
from tiers.policies.s3fifo import S3FIFO
from tiers.policies.sieve import SIEVE
from tiers.policies.wtinylfu import WTinyLFU

POLICIES: dict[str, type[Policy]] = {
    policy.NAME: policy for policy in (ARC, FIFO, LFU, LRU, S3FIFO, SIEVE, WTinyLFU)
}

DEFAULT_POLICY = ARC.NAME
"""Near the best on every trace, with nothing to set; `scripts/bench/policies.py` prints figures."""

__all__ = [
    "ARC",
    "DEFAULT_POLICY",
    "FIFO",
    "LFU",
    "LRU",
    "POLICIES",
    "S3FIFO",
    "SIEVE",
    "Policy",
    "WTinyLFU",
]
