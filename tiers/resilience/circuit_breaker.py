"""A circuit breaker: after failures in a row nothing is asked for until a probe succeeds.

So an outage costs a few calls their deadline, and not every one (Nygard, «Release It!», 2018,
chapter 5). The probe goes on in the background, where nobody waits for it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

FAILURES = 3
"""So many in a row open the breaker."""
_PAUSE_S = 1.0


class CircuitBreaker:
    """Opens after `FAILURES` in a row, and closes when `probe` has returned without an error.

    Args:
        probe: tries whether calls would succeed; must end by itself.
        closed: told when calls may be made again.
        pause_s: seconds before each probe.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[object]],
        closed: Callable[[], None],
        *,
        pause_s: float = _PAUSE_S,
    ) -> None:
        self._probe, self._closed, self._pause_s = probe, closed, pause_s
        self._failures = 0
        self._recovery: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether no call should be made."""
        return self._recovery is not None

    def succeeded(self) -> None:
        """Note that a call has succeeded."""
        self._failures = 0

    def failed(self) -> bool:
        """Note that a call has failed. Returns whether the breaker opens for it."""
        if self.is_open:
            return False
        self._failures += 1
        if self._failures < FAILURES:
            return False
        self._recovery = asyncio.create_task(self._recover())
        return True

    async def close(self) -> None:
        """End probing."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])

    async def _recover(self) -> None:
        is_well = False
        while not is_well:
            await asyncio.sleep(self._pause_s)
            with contextlib.suppress(Exception):
                await self._probe()
                is_well = True
        self._failures = 0
        self._recovery = None
        self._closed()
