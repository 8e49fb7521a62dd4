"""A circuit breaker: after failures in a row, no call is made until a probe succeeds.

So an outage costs a few calls their deadline, not all of them (Nygard, «Release It!», 2018,
chapter 5). The probe runs in the background, where nobody waits for it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

FAILURES = 3
"""How many failures in a row open the breaker."""
_PAUSE_S = 1.0


class CircuitBreaker:
    """Opens after `FAILURES` in a row, and closes when `probe` returns without an error.

    Args:
        probe: tries whether calls would succeed; must end by itself.
        on_close: called when calls may be made again.
        pause_s: seconds before each probe.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[object]],
        on_close: Callable[[], None],
        *,
        pause_s: float = _PAUSE_S,
    ) -> None:
        self._probe, self._on_close, self._pause_s = probe, on_close, pause_s
        self._failures = 0
        self._recovery: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether no call should be made."""
        return self._recovery is not None

    def succeeded(self) -> None:
        """Record that a call has succeeded."""
        self._failures = 0

    def failed(self) -> bool:
        """Record that a call has failed. Returns whether this opens the breaker."""
        if self.is_open:
            return False
        self._failures += 1
        if self._failures < FAILURES:
            return False
        self._recovery = asyncio.create_task(self._recover())
        return True

    async def close(self) -> None:
        """Stop probing."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])

    async def _recover(self) -> None:
        has_recovered = False
        while not has_recovered:
            await asyncio.sleep(self._pause_s)
            with contextlib.suppress(Exception):
                await self._probe()
                has_recovered = True
        self._failures = 0
        self._recovery = None
        self._on_close()
