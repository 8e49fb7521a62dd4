"""The cache: answers, their keys, and the tiers that hold them.

Knows nothing of HTTP and nothing of vLLM. `Chain` is the way in; `MemoryCache` and `DiskCache`
are aiocache backends that also work without the rest.
"""

from tiers.answer import Answer, Entry, Form, Freshness, Origin, State
from tiers.chain import Adoption, Chain, Hit
from tiers.copies import Copies
from tiers.disk import DiskCache
from tiers.flight import Flight, Flights
from tiers.frequency import FrequencySketch
from tiers.key import digest
from tiers.lease import FileLeases
from tiers.memory import MemoryCache
from tiers.movement import Demotion, Movement, Write
from tiers.purges import PurgeError, Purges
from tiers.tier import Tier
from tiers.turn import Turns

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
