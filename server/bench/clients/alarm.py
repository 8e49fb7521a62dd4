"""A timer that rings within some 0.1 ms; those of event loops are rounded to 1 ms."""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from math import inf

# Linux, timerfd_create(2).
_ABSOLUTE = 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


class Alarm:
    """Calls back at a time of CLOCK_MONOTONIC.

    Args:
        ring: is called by the event loop that runs now.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._file, self._on_expired)

    def set(self, at: float) -> None:
        """Ring once at a time, at once if it has passed; never if it is infinite."""
        # A time of 0 would disarm the timer.
        nanoseconds = 0 if at == inf else max(1, round(at * 1e9))
        value = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 1_000_000_000))
        self._libc.timerfd_settime(self._file, _ABSOLUTE, value, None)

    def close(self) -> None:
        """Release the timer, which never rings again."""
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _on_expired(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:
            # It was set anew meanwhile.
            return
        self._ring()
