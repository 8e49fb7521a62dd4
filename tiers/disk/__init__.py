"""The disk tier: an aiocache backend that stores entries in an LMDB file.

Needs nothing of the other tiers. `DiskCache` is the way in; `compact` works on a file that nobody
has open, and so does `tiers.disk.verify`.
"""

from tiers.disk.cache import MIN_BYTES, DiskCache
from tiers.disk.file import OtherFormatError, Statistics
from tiers.disk.opening import Compacted, compact
from tiers.disk.writer import Durability

__all__ = [
    "MIN_BYTES",
    "Compacted",
    "DiskCache",
    "Durability",
    "OtherFormatError",
    "Statistics",
    "compact",
]
