"""Who has a store's folder open, who writes to it, and whether its index is trusted.

All of it is in the file `owners`. Whoever opens the store locks a byte of it, its slot, and writes
1 there until it closes the store. The kernel frees the lock when the process ends, so a slot that
holds 1 and isn't locked is that of a process that died.

LMDB trusts its pages: of a damaged one a process may die, as often as it is started. So the pages
are verified once `MAX_DEATHS` processes in a row haven't closed the store. Where damage is known,
the store is begun anew, since every block can be computed again.

No waiting is without end. LMDB's own lock for writers is taken only by who has ours, and to get
that takes seconds at most, or fails.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiers.file_locks import is_locked, set_lock

OWNERS = "owners"
MAX_DEATHS = 3
LOCK_WAIT_S = 5.0
"""A writer holds the lock for milliseconds, unless its disk hangs or it is stopped."""
_POLL_S = 0.001
_OURS, _DEATHS, _DAMAGED, _FIRST_SLOT = range(4)
"""Offsets: whether we have made the index, deaths in a row, whether there is damage, and slots."""
_SLOTS = 1020
_TURN, _LOCK = 4096, 4097
"""Offsets of locks: of who is the next to write, and of who writes."""


class Folder:
    """A store's folder, which one process has open. Any thread may use it.

    Args:
        path: the folder, which must exist.

    Raises:
        OSError: the folder can't be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path / OWNERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock, self._depth = threading.RLock(), 0
        self.owner = 0
        """Our slot, once we have one."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep all others from opening or writing; may be nested.

        Raises:
            TimeoutError: another process doesn't give up the lock.
        """
        give_up_at = time.monotonic() + LOCK_WAIT_S
        if not self._lock.acquire(timeout=LOCK_WAIT_S):
            raise self._timeout()
        try:
            if not self._depth:
                # Who waits for the lock has the turn, so that who has just given it up can't take
                # it again first.
                self._wait_for(_TURN, give_up_at)
                try:
                    self._wait_for(_LOCK, give_up_at)
                finally:
                    set_lock(self._file, fcntl.F_UNLCK, _TURN)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    set_lock(self._file, fcntl.F_UNLCK, _LOCK)
        finally:
            self._lock.release()

    def join(self) -> None:
        """Take a slot, and count who has died since. Needs the lock.

        Raises:
            OSError: too many processes have the folder open.
        """
        dead = self._dead()
        self._write(_DEATHS, min(self._read(_DEATHS) + len(dead), MAX_DEATHS))
        for slot in dead:
            self._write(slot, 0)
        for slot in range(_FIRST_SLOT, _FIRST_SLOT + _SLOTS):
            try:
                set_lock(self._file, fcntl.F_WRLCK, slot)
            except (BlockingIOError, PermissionError):
                continue
            self.owner = slot
            self._write(slot, 1)
            return
        raise OSError(errno.EUSERS, f"{_SLOTS} processes have it open", str(self.path))

    def leave(self) -> None:
        """Give up the slot, if we have one, and close the file."""
        if self.owner:
            self.mark_end()
            self.owner = 0
        os.close(self._file)

    def mark_end(self) -> None:
        """Note that this process may end without closing the store from now on: no death."""
        self._write(self.owner, 0)
        if not self._dead():
            self._write(_DEATHS, 0)

    def forgive_deaths(self) -> None:
        """Note that all processes that have died until now were ended on purpose."""
        for slot in self._dead():
            self._write(slot, 0)

    def is_alive(self, owner: int) -> bool:
        """Return whether another index than ours has that slot."""
        return owner != self.owner and is_locked(self._file, owner)

    def is_shared(self) -> bool:
        """Return whether another index has the folder open, in this process or in another."""
        return is_locked(self._file, _FIRST_SLOT, _SLOTS)

    @property
    def is_ours(self) -> bool:
        """Whether the index in the folder is one that this package has made."""
        return bool(self._read(_OURS))

    @property
    def is_damaged(self) -> bool:
        """Whether damage was noted."""
        return bool(self._read(_DAMAGED))

    @property
    def may_kill(self) -> bool:
        """Whether so many processes have died that the index may be what kills them."""
        return self._read(_DEATHS) >= MAX_DEATHS

    def mark_ours(self) -> None:
        """Note that the index is made by us, or about to be."""
        self._write(_OURS, 1)

    def mark_whole(self) -> None:
        """Note that the index has been verified, or is made anew."""
        self._write(_DAMAGED, 0)
        self._write(_DEATHS, 0)

    def mark_damaged(self) -> None:
        """Have the store begun anew when it is opened next."""
        self._write(_DAMAGED, 1)

    def _dead(self) -> list[int]:
        """Return the slots of processes that have died."""
        slots = os.pread(self._file, _SLOTS, _FIRST_SLOT)
        return [
            slot
            for slot, held in enumerate(slots, _FIRST_SLOT)
            if held and slot != self.owner and not is_locked(self._file, slot)
        ]

    def _wait_for(self, offset: int, give_up_at: float) -> None:
        while True:
            try:
                set_lock(self._file, fcntl.F_WRLCK, offset)
            except (BlockingIOError, PermissionError):
                if time.monotonic() > give_up_at:
                    raise self._timeout() from None
                time.sleep(_POLL_S)
            else:
                return

    def _timeout(self) -> TimeoutError:
        why = f"another process has locked the prefix blocks for more than {LOCK_WAIT_S} s"
        return TimeoutError(errno.ETIMEDOUT, why, str(self.path))

    def _read(self, at: int) -> int:
        return int.from_bytes(os.pread(self._file, 1, at))

    def _write(self, at: int, value: int) -> None:
        os.pwrite(self._file, bytes((value,)), at)
