"""The disk tier: an aiocache backend that stores entries in an LMDB file.

Needs nothing of the other tiers. `DiskCache` is the way in; `upkeep` has what is done to a file by
hand.
"""

from tiers.disk.cache import MIN_BYTES, DiskCache
from tiers.disk.encryption import KEY_BYTES, EncryptionKeyError
from tiers.disk.file import MAX_KEY_BYTES, OtherFormatError, Statistics
from tiers.disk.maintenance import Compacted, Verified, check, check_key, compact
from tiers.disk.recovery import UntrustedError
from tiers.disk.writer import Durability

__all__ = [
    "KEY_BYTES",
    "MAX_KEY_BYTES",
    "MIN_BYTES",
    "Compacted",
    "DiskCache",
    "Durability",
    "EncryptionKeyError",
    "OtherFormatError",
    "Statistics",
    "UntrustedError",
    "Verified",
    "check",
    "check_key",
    "compact",
]
