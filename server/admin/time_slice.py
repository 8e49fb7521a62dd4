"""Cooperative scheduling: long loops over entries let the event loop run between time slices."""

import asyncio
import time

_SLICE_S = 0.001


class TimeSlice:
    """Lets the event loop run whenever a time slice of 1 ms is over."""

    def __init__(self) -> None:
        self._ends_at = time.perf_counter() + _SLICE_S

    async def yield_if_over(self) -> None:
        """Let other tasks run if the slice is over, and start the next one."""
        if time.perf_counter() >= self._ends_at:
            await asyncio.sleep(0)
            self._ends_at = time.perf_counter() + _SLICE_S
