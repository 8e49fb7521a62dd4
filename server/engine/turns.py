"""Turns: how much is done for requests that engines answer between two looks at the sockets.

The event loop runs all that is ready, and only then looks at its sockets again. Beside many
requests that miss, a hit would wait for a step of each of them. So such a step waits for its turn,
first come, first served, and each turn of the loop takes as many as fit into a quarter of a
millisecond. A step that comes alone never waits.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

_TURN_S = 0.00025
_MOST_STEPS = 32


class Turns:
    """The turns of one event loop.

    Args:
        clock: in seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        # How many steps fit into a turn, and how many more this turn takes.
        self._fitting = self._left = 1
        self._began_at = 0.0
        self._is_counting = False

    async def take(self) -> None:
        """Return when the caller may do its next step, of at most a few hundred microseconds."""
        loop = asyncio.get_running_loop()
        if not self._is_counting:
            self._is_counting, self._left, self._began_at = True, self._fitting, self._clock()
            loop.call_soon(self._begin_next)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _begin_next(self) -> None:
        """Wake the first that wait, whose steps are in the loop's next turn."""
        now, had_room = self._clock(), self._left > 0
        took_s, self._began_at = now - self._began_at, now
        if took_s > _TURN_S:
            self._fitting = max(self._fitting // 2, 1)
        elif not had_room:
            self._fitting = min(self._fitting + 1, _MOST_STEPS)
        self._left = self._fitting
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        self._is_counting = self._left < self._fitting
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._begin_next)
