"""The clock of the shared tier's server, by which machines whose clocks differ agree on times.

Entries in the shared tier carry times by the server's clock. Each machine converts them by how far
that is ahead of its own, so an entry's age and expiry are the same everywhere.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

EVERY_S = 5.0
"""Seconds after which the server is asked again."""
_STEP_S = 0.25
# Two machines then differ by less than `SKEW_S` (`tiers.entry`), which is taken for none. Below it
# an offset stays as it is, so that the times of an entry stay equal.
_TOLERANCE_S = 0.4


@runtime_checkable
class HasTime(Protocol):
    """A backend whose server tells its time."""

    async def time_s(self) -> float:
        """Return the Unix seconds of the server's clock."""


class ServerClock:
    """How far the server's clock is ahead of ours; 0 if it doesn't tell its time.

    Args:
        backend: of the shared tier.
        clock: returns our Unix seconds.
        monotonic: a monotonic clock in seconds.
    """

    def __init__(
        self,
        backend: object,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ahead_s = 0.0
        """By how many seconds, in steps of 0.25; 0 if it is less than 0.4."""
        self._backend = backend if isinstance(backend, HasTime) else None
        self._clock, self._monotonic = clock, monotonic
        self._due_at = monotonic()

    async def observe(self) -> None:
        """Ask the server for its time, unless that was done lately. A failure changes nothing."""
        if self._backend is None or self._monotonic() < self._due_at:
            return
        with contextlib.suppress(Exception):
            before = self._clock()
            server = await self._backend.time_s()
            after = self._clock()
            # The server read its clock somewhere in between.
            low, high = server - after - _TOLERANCE_S, server - before + _TOLERANCE_S
            if not low <= self.ahead_s <= high:
                self.ahead_s = round((low + high) / 2 / _STEP_S) * _STEP_S
            self._due_at = self._monotonic() + EVERY_S
