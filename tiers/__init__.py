"""The cache: answers, their keys, and the tiers that hold them.

Knows nothing of HTTP and nothing of vLLM. `Chain` is the way in; `MemoryCache` and `DiskCache`
are aiocache backends that also work without the rest.
"""

from tiers.chain import Adoption, Chain, Hit
from tiers.disk import DiskCache
from tiers.entry import Answer, Entry, Form, Freshness, Origin, State
from tiers.frequency import FrequencySketch
from tiers.key import digest
from tiers.memory.cache import MemoryCache
from tiers.movement.background import Movement
from tiers.movement.copies import Copies
from tiers.movement.demotion import Demotion, Write
from tiers.purges.purges import PurgeError, Purges
from tiers.singleflight.flight import Flight, Flights
from tiers.singleflight.leases import FileLeases
from tiers.singleflight.turns import Turns
from tiers.tier import Tier

__all__ = [
    "Adoption",
    "Answer",
    "Chain",
    "Copies",
    "Demotion",
    "DiskCache",
    "Entry",
    "FileLeases",
    "Flight",
    "Flights",
    "Form",
    "FrequencySketch",
    "Freshness",
    "Hit",
    "MemoryCache",
    "Movement",
    "Origin",
    "PurgeError",
    "Purges",
    "State",
    "Tier",
    "Turns",
    "Write",
    "digest",
]
