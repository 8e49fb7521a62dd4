"""The disk tier: an aiocache backend that stores entries in an LMDB file.

It imports nothing of the other tiers. `DiskCache` is the entry point; `maintenance` compacts and
verifies a file for an operator.
"""

from tiers.backend import MAX_KEY_BYTES
from tiers.disk.cache import MIN_BYTES, DiskCache
from tiers.disk.file import OtherFormatError
from tiers.disk.maintenance import Compacted, check_key, compact, verify_in_use
from tiers.disk.recovery import UntrustedError
from tiers.disk.verify import VerifyReport
from tiers.disk.writer import Durability
from tiers.encryption import KEY_BYTES, EncryptionKeyError

__all__ = [
    "KEY_BYTES",
    "MAX_KEY_BYTES",
    "MIN_BYTES",
    "Compacted",
    "DiskCache",
    "Durability",
    "EncryptionKeyError",
    "OtherFormatError",
    "UntrustedError",
    "VerifyReport",
    "check_key",
    "compact",
    "verify_in_use",
]
