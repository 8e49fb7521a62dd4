"""Locks of single bytes of an open file: open file description locks (fcntl(2)).

Unlike POSIX record locks, they aren't lost when the process closes another descriptor of the file.
The kernel frees them when the process ends, by whatever cause; none of them writes anything.
"""

import fcntl
import os
from struct import Struct

# `struct flock` of 64-bit Linux: type, whence, start, length, process.
_FLOCK = Struct("hhqqi4x")
OFFSETS = 1 << 62
"""How many offsets a file has, less two bits to spare."""


def set_lock(file: int, kind: int, offset: int) -> None:
    """Lock a byte (`F_RDLCK`, `F_WRLCK`) or free it (`F_UNLCK`).

    Raises:
        BlockingIOError: somebody else has a lock that excludes it.
        OSError: the file can't be locked.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))


def are_others_locked(file: int, offset: int) -> bool:
    """Return whether somebody else has locked another byte than that at `offset`."""
    parts = (0, offset), (offset + 1, 0)
    # A length of 0 is all that follows.
    return any(_is_locked(file, *part) for part in parts if part != (0, 0))


def _is_locked(file: int, offset: int, length: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)
