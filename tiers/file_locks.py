"""Locks of single bytes of an open file: open file description locks (fcntl(2)).

Unlike POSIX record locks, they aren't lost when the process closes another descriptor of the file.
The kernel frees them when the process ends, however it ends. They write nothing.
"""

import fcntl
import os
from struct import Struct

# `struct flock` of 64-bit Linux: type, whence, start, length, process.
_FLOCK = Struct("hhqqi4x")
OFFSETS = 1 << 62
"""The number of offsets that may be locked."""


def set_lock(file: int, kind: int, offset: int) -> None:
    """Lock a byte (`F_RDLCK`, `F_WRLCK`) or free it (`F_UNLCK`).

    Raises:
        BlockingIOError: another open file description has a conflicting lock.
        OSError: the file can't be locked.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))


def are_others_locked(file: int, offset: int) -> bool:
    """Return whether another open file description has locked a byte other than `offset`."""
    parts = (0, offset), (offset + 1, 0)
    return any(is_locked(file, *part) for part in parts if part != (0, 0))


def is_locked(file: int, offset: int, length: int = 1) -> bool:
    """Return whether another open file description has locked one of these bytes.

    A length of 0 means up to the end of the file.
    """
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, query))
    return bool(kind != fcntl.F_UNLCK)
