"""A multi-tier cache of answers: `AnswerCache` over a `Chain` of `Tier`s over aiocache backends.

`tiers/README.md` shows its use. `MemoryCache` and `DiskCache` are aiocache backends that also work
alone. Callers decide what an answer's bytes and labels mean.
"""

from tiers.acceptance import Acceptance
from tiers.answer_cache import AnswerCache, Pending
from tiers.background import BackgroundWork
from tiers.chain import Chain, Hit, ImportResult
from tiers.disk import DiskCache
from tiers.entry import Answer, Entry, Freshness, Provenance, State
from tiers.frequency import FrequencySketch
from tiers.key import digest
from tiers.memory.cache import MemoryCache
from tiers.movement.demotion import Demotion, WritePolicy
from tiers.movement.transfers import Transfers
from tiers.purges.purges import PurgeError, Purges
from tiers.singleflight.flight import Flight, SingleFlight
from tiers.singleflight.leases import FileLeases
from tiers.singleflight.lock import GenerationLock
from tiers.tier import Tier

__all__ = [
    "Acceptance",
    "Answer",
    "AnswerCache",
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
    "Pending",
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
