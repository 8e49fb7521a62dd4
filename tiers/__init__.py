"""The cache: answers, their keys, and the tiers that hold them.

Knows nothing of HTTP and nothing of vLLM. `Chain` is the way in; `MemoryCache` and `DiskCache`
are aiocache backends that also work without the rest.
"""

from tiers.chain import Chain, Hit, ImportResult
from tiers.disk import DiskCache
from tiers.entry import Answer, Entry, Freshness, Provenance, State
from tiers.frequency import FrequencySketch
from tiers.key import digest
from tiers.memory.cache import MemoryCache
from tiers.movement.background import BackgroundWork
from tiers.movement.copies import Transfers
from tiers.movement.demotion import Demotion, WritePolicy
from tiers.purges.purges import PurgeError, Purges
from tiers.singleflight.flight import Flight, SingleFlight
from tiers.singleflight.leases import FileLeases
from tiers.singleflight.lock import GenerationLock
from tiers.tier import Tier

__all__ = [
    "Answer",
    "BackgroundWork",
    "Chain",
    "Demotion",
    "DiskCache",
    "Entry",
    "FileLeases",
    "Flight",
    "FrequencySketch",
    "Freshness",
    "GenerationLock",
    "Hit",
    "ImportResult",
    "MemoryCache",
    "Provenance",
    "PurgeError",
    "Purges",
    "SingleFlight",
    "State",
    "Tier",
    "Transfers",
    "WritePolicy",
    "digest",
]
