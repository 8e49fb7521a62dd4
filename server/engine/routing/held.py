"""Requests that found no engine, and those of them that are held until there is one."""

import asyncio
from typing import Literal

from server.auth.limits import Limits, LimitUsage, LocalUsage
from server.engine.upstream import UnavailableError

Demand = Literal["none", "counted", "held"]
"""What happens to a request that finds no engine: nothing but its refusal, as where no engine needs
to be started for it; it is counted, too; or it is counted and held."""


class NoEngineError(UnavailableError):
    """No upstream is ready, or none takes a connection."""


class HeldRequests:
    """The requests of one model that found no engine.

    Args:
        wait_s: how long one may wait for an engine; 0 for none.
        max_requests: how many may wait at once, in all processes that share the usage.
        usage: counts them.
    """

    def __init__(
        self, wait_s: float = 0, max_requests: int = 0, usage: LimitUsage | None = None
    ) -> None:
        self._wait_s, self._limits = wait_s, Limits(max_requests=max_requests)
        self._usage = LocalUsage() if usage is None else usage
        self._arrival, self._has_ended = asyncio.Event(), False
        self.found_none = 0
        """How many found no engine in this process, whether they waited then or not."""

    def set_max_requests(self, number: int) -> None:
        """Let so many wait at once from now on."""
        self._limits = Limits(max_requests=number)

    @property
    def waiting(self) -> int:
        """How many wait now, in all processes that share the usage."""
        return self._usage.active

    def count(self) -> float:
        """Count a request that found no engine; returns until when it may wait (event loop s)."""
        self.found_none += 1
        return asyncio.get_running_loop().time() + self._wait_s

    async def wait(self, until: float, *, is_there: bool) -> None:
        """Wait until an engine arrives, unless one `is_there` by now.

        Raises:
            NoEngineError: none does in time, too many wait already, or the server stops.
        """
        is_late = asyncio.get_running_loop().time() >= until
        if is_late or self._has_ended:
            raise NoEngineError
        if is_there:
            return
        if self._usage.begin(self._limits, 0) is not None:
            raise NoEngineError
        try:
            async with asyncio.timeout_at(until):
                await self._arrival.wait()
        except TimeoutError:
            raise NoEngineError from None
        finally:
            self._usage.end()
        if self._has_ended:
            raise NoEngineError

    def go_on(self) -> None:
        """Let all go on that wait, since an engine has arrived."""
        self._arrival.set()
        self._arrival = asyncio.Event()

    def end(self) -> None:
        """Refuse all that wait, and all that come."""
        self._has_ended = True
        self.go_on()
