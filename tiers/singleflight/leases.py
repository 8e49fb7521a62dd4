"""Leases: the right to generate the answer under a key, among all processes that share a tier.

A lease saves duplicate generations and protects nothing: where one is lost, or a server of leases
fails, two processes generate the same answer. So a lease that can't be taken because of a failure
counts as taken.
"""

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from tiers.file_locks import OFFSETS, set_lock

logger = logging.getLogger(__name__)

FILE = "leases.lock"


class Leases(Protocol):
    """Leases among some processes. A process may hold one several times, as may a key's flights."""

    async def take(self, key: str) -> bool:
        """Return whether we hold the lease now; then the caller must `release` it once."""

    async def release(self, key: str) -> None:
        """Give up the lease, or one of several times that we hold it."""

    async def close(self) -> None:
        """Give up all leases."""


class FileLeases:
    """Leases among the processes of one machine: locks of single bytes of an empty file.

    Taking and releasing one costs microseconds.

    Args:
        folder: where the file is; must exist.
        sees_others: returns whether answers that other processes store are found here now; while
            they aren't, waiting is pointless, so each lease counts as ours.

    Raises:
        OSError: the file can't be opened.
    """

    def __init__(self, folder: Path, sees_others: Callable[[], bool] = lambda: True) -> None:
        # Not inherited: a child that lives on would hold our leases.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file: int | None = os.open(folder / FILE, flags, 0o600)
        self._sees_others = sees_others
        self._times: Counter[int] = Counter()

    async def take(self, key: str) -> bool:
        offset = _offset_of(key)
        is_held = self._times[offset] or self._lock(offset, fcntl.F_WRLCK)
        if not is_held and self._sees_others():
            return False
        self._times[offset] += 1
        return True

    async def release(self, key: str) -> None:
        offset = _offset_of(key)
        self._times[offset] -= 1
        if not self._times[offset]:
            del self._times[offset]
            self._lock(offset, fcntl.F_UNLCK)

    async def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _lock(self, offset: int, kind: int) -> bool:
        if self._file is None:
            return True
        try:
            set_lock(self._file, kind, offset)
        except BlockingIOError:
            return False
        except OSError:
            logger.exception("a lease can't be taken and counts as ours")
        return True


def _offset_of(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % OFFSETS
