"""Counters that all workers of a server share, in memory that they map (memfd_create(2)).

They hold what tenants and models use of their limits, and whose turn it is among variants. Each
worker counts its requests under way in a column of its own, so that those of a dead worker can be
forgotten. Invariant: between a check of a limit and its count no other process changes the usage,
so no limit is ever exceeded. The lock for that is the kernel's (flock(2)), which frees it when its
holder is killed.

A usage has a row, found by a digest of its name. Rows without users are given to new names. Where
none is left, the others share the last row, so their limits hold for all of these together.
"""

import ctypes
import fcntl
import logging
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import pairwise
from struct import Struct
from typing import Self

from server.auth.limits import Limits, RateLimited, full_after, refusal

logger = logging.getLogger(__name__)

_ROWS = 16 * 1024
# Of 10,000 keys a dozen pairs share a turn; such keys may skip a variant now and then.
_TURNS = 4 * 1024**2
_HEADER = Struct("=QQ")
_DIGEST_BYTES = 16
_NO_DIGEST = bytes(_DIGEST_BYTES)
# The lock is held for microseconds, unless its holder waits for a CPU. One that is stopped in a
# debugger must not stop all others: without the lock a request is refused; later ones wait less.
_LOCK_WAIT_S = 0.05
_NEXT_LOCK_WAIT_S = 0.001
_ROW_WAIT_S = 5.0
_LOCK, _FREE = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN
# Unlike `fcntl.flock`, it keeps the GIL: another thread that took it while we hold the lock would
# make all workers wait.
_flock = ctypes.PyDLL(None).flock
_BUSY = RateLimited("The limits can't be checked now; try again.", 1, "max_requests")


class SharedCounters:
    """The counters, as one process sees them. Each process uses them in one thread only.

    Made by `create` and `open`.
    """

    def __init__(self, fd: int, file: int, worker: int) -> None:
        self.fd = fd
        """The file descriptor that workers inherit, for `open`."""
        # An open file of its own, since locks belong to open files.
        self._file = file
        memory = memoryview(mmap.mmap(file, 0))
        sizes: tuple[int, int] = _HEADER.unpack_from(memory)
        self._rows, offsets = sizes[1], _offsets(*sizes)
        parts = [memory[begin:end] for begin, end in pairwise(offsets)]
        self._digests = parts[0]
        self.full_at: memoryview[float] = parts[1].cast("d")
        """When each row's bucket is full (monotonic s)."""
        self.users: memoryview[int] = parts[2].cast("I")
        self.active: memoryview[int] = parts[3].cast("I")
        """How many users each row has, and requests under way; a column for each worker."""
        self.turns = parts[4]
        """Numbers below 256, by a digest of a key: whose turn it is."""
        self._column = worker * self.stride
        self._is_stuck = False

    @classmethod
    def create(cls, workers: int, *, rows: int = _ROWS) -> Self:
        """Return new counters; the process that creates them counts as no worker.

        Args:
            workers: how many there are at once, numbered from 0.
            rows: how many tenants and models with limits have counters of their own.
        """
        fd = os.memfd_create("tierserve-counters")
        os.ftruncate(fd, _offsets(workers, rows)[-1])
        os.pwrite(fd, _HEADER.pack(workers, rows), 0)
        return cls.open(fd, worker=workers)

    @classmethod
    def open(cls, fd: int, worker: int) -> Self:
        """Return the counters of a file descriptor, as the worker of that number sees them."""
        return cls(fd, os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), worker)

    @property
    def stride(self) -> int:
        """How many rows a worker's column has: the shared one is the last."""
        return self._rows + 1

    def usage(self, name: str, active: int = 0) -> "SharedUsage":
        """Return the usage of that name; all workers that ask for it share it.

        Args:
            name: of a tenant or a model.
            active: how many of its requests are under way in this worker already.

        Raises:
            TimeoutError: another process holds the lock for seconds, as if it were stopped.
        """
        with self._locked():
            row = self._row_of(blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest())
            self.users[self._column + row] += 1
            self.active[self._column + row] += active
        if row == self._rows:
            text = "more than %d tenants have limits; those of %s and others hold for all together"
            logger.error(text, self._rows, name)
        return SharedUsage(self, row, self._column + row, active)

    def forget(self, worker: int) -> None:
        """End what a dead worker had under way. Then another may have its number."""
        for column in (self.users, self.active):
            begin = worker * self.stride
            column[begin : begin + self.stride] = memoryview(bytes(4 * self.stride)).cast("I")

    def lock(self, wait_s: float = _LOCK_WAIT_S) -> bool:
        """Wait for the lock, and return whether we have it; `unlock` frees it."""
        until = 0.0
        while _flock(self._file, _LOCK):
            now = time.monotonic()
            until = until or now + (_NEXT_LOCK_WAIT_S if self._is_stuck else wait_s)
            if now >= until:
                self._is_stuck = True
                return False
            os.sched_yield()
        self._is_stuck = False
        return True

    def unlock(self) -> None:
        """Free the lock."""
        _flock(self._file, _FREE)

    def close(self) -> None:
        """Close the files. The counters go on until nothing refers to them."""
        for file in (self.fd, self._file):
            with suppress(OSError):
                os.close(file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.lock(_ROW_WAIT_S):
            raise TimeoutError("another process holds the lock of the shared counters")
        try:
            yield
        finally:
            self.unlock()

    def _row_of(self, digest: bytes) -> int:
        """Return the row of a digest, which gets one if it has none (linear probing)."""
        unused = None
        begin = int.from_bytes(digest[:8])
        for probe in range(self._rows):
            row = (begin + probe) % self._rows
            held = self._digests[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES]
            if held == digest:
                return row
            if unused is None and not any(self.users[row :: self.stride]):
                unused = row
            if held == _NO_DIGEST:
                break
        if unused is None:
            return self._rows
        self._digests[unused * _DIGEST_BYTES : (unused + 1) * _DIGEST_BYTES] = digest
        self.full_at[unused] = 0.0
        return unused


class SharedUsage:
    """What a tenant or a model uses of its limits, in all workers. It is a `LimitUsage`.

    Args:
        counters: hold it.
        row: its row in them.
        own: the place of this worker's requests under way.
        active: how many of those it has counted.
    """

    __slots__ = ("_active", "_counters", "_own", "_own_active", "_row")

    def __init__(self, counters: SharedCounters, row: int, own: int, active: int) -> None:
        self._counters, self._row, self._own, self._own_active = counters, row, own, active
        self._active = counters.active[row :: counters.stride]

    @property
    def active(self) -> int:
        """How many requests are under way, in all processes."""
        return sum(self._active)

    @property
    def full_at(self) -> float:
        """When the bucket is full (monotonic s)."""
        return self._counters.full_at[self._row]

    def begin(self, limits: Limits, now: float) -> RateLimited | None:
        """Count a request that begins, which `end` must follow, or return why it is refused."""
        counters, row = self._counters, self._row
        if not counters.lock():
            return _BUSY
        try:
            full_at = counters.full_at[row]
            refused = refusal(limits, sum(self._active), full_at, now)
            if refused is None:
                counters.active[self._own] += 1
                if limits.requests_per_minute is not None:
                    counters.full_at[row] = full_after(limits.requests_per_minute, full_at, now)
        finally:
            counters.unlock()
        if refused is None:
            self._own_active += 1
        return refused

    def end(self) -> None:
        """Count the end of a request."""
        # Nobody else writes there, so it needs no lock.
        self._counters.active[self._own] -= 1
        self._own_active -= 1

    def close(self) -> None:
        """Stop counting; requests under way don't count any more."""
        self._counters.active[self._own] -= self._own_active
        self._counters.users[self._own] -= 1


def _offsets(workers: int, rows: int) -> list[int]:
    """Return where the parts of the memory begin, and its end."""
    digests, full_at = rows * _DIGEST_BYTES, (rows + 1) * 8
    # Numbers of four bytes, of every worker and of the process that created the counters.
    columns = -(-(workers + 1) * (rows + 1) * 4 // 8) * 8
    offsets = [_HEADER.size]
    for length in (digests, full_at, columns, columns, _TURNS):
        offsets.append(offsets[-1] + length)
    return offsets
