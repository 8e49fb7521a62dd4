"""How long work on many entries goes on before requests have their turn."""

import asyncio
import time

_SLICE_S = 0.001


class TimeSlice:
    """Lets others go on in the event loop once a slice of time has been used."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + _SLICE_S

    async def yield_if_over(self) -> None:
        """Pause, if it is time to."""
        if time.perf_counter() >= self._until:
            await asyncio.sleep(0)
            self._until = time.perf_counter() + _SLICE_S
