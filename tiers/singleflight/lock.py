"""The lock that a process holds while it generates an answer: single flight among processes.

The process that holds the lease generates. The others poll the tiers for its answer, and the lease,
which is free once that process has ended or has generated nothing to store. Invariant: no process
waits longer than `wait_s`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from math import inf

from tiers.chain import Chain
from tiers.entry import Answer
from tiers.singleflight.leases import Leases

# The first is about a store's time, the last a tenth of a short generation's.
_FIRST_POLL_S = 0.005
_LAST_POLL_S = 0.1
_GROWTH = 1.5


@dataclass(slots=True)
class LockStats:
    """Waits for another process since this process started, by how they ended."""

    waiting: int = 0
    """Waits that go on now."""
    answered: int = 0
    """The other process stored its answer."""
    took_over: int = 0
    """The lease became free without an answer."""
    gave_up: int = 0
    """Neither happened within `wait_s`."""
    aborted: int = 0
    """The last subscriber left."""


class GenerationLock:
    """Lets one process at a time generate the answer under a key.

    Args:
        chain: where the answers of other processes appear.
        leases: all of them are taken, in this order; without any, this process never waits.
        wait_s: the most seconds to wait for others; with 0 no leases are taken.
        clock: a monotonic clock, in seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        chain: Chain,
        leases: Sequence[Leases],
        *,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._chain, self._leases = chain, tuple(leases)
        self.wait_s = wait_s
        """May be changed at any time."""
        self._clock, self._sleep = clock, sleep
        self.stats = LockStats()

    @asynccontextmanager
    async def acquire(
        self, key: str, purge_epoch: int, not_before: float
    ) -> AsyncIterator[Answer | None]:
        """Hold the lock of `key` for as long as the context lasts.

        Yields the answer that another process has stored since `not_before` (Unix s). `None` asks
        for an answer to be generated, and to be stored before the context ends. With `inf` no
        answer of another process is accepted, so none is waited for. Callers of different
        `purge_epoch`s don't wait for each other, since a purge between them outdates the answer.
        """
        async with AsyncExitStack() as held:
            answer, lease = None, f"{key}.{purge_epoch}"
            takes_leases = self._leases and self.wait_s > 0
            is_ours = not takes_leases or await self._take(lease, held)
            if takes_leases and not_before < inf:
                # If it is ours, it may have been stored between the lookup and now.
                find = self._chain.find_newer if is_ours else partial(self._wait, lease, held)
                answer = await find(key, not_before)
            yield answer

    async def close(self) -> None:
        """Release the leases that are still held."""
        for leases in self._leases:
            await leases.close()

    async def _wait(
        self, lease: str, held: AsyncExitStack, key: str, not_before: float
    ) -> Answer | None:
        stats, until, poll_s = self.stats, self._clock() + self.wait_s, _FIRST_POLL_S
        stats.waiting += 1
        try:
            while (left_s := until - self._clock()) > 0:
                await self._sleep(min(poll_s, left_s))
                poll_s = min(poll_s * _GROWTH, _LAST_POLL_S)
                is_ours = await self._take(lease, held)
                # In this order: what is stored before a lease is released is found after it.
                answer = await self._chain.find_newer(key, not_before)
                if answer is not None:
                    stats.answered += 1
                    return answer
                if is_ours:
                    stats.took_over += 1
                    return None
        except asyncio.CancelledError:
            stats.aborted += 1
            raise
        finally:
            stats.waiting -= 1
        stats.gave_up += 1
        return None

    async def _take(self, lease: str, held: AsyncExitStack) -> bool:
        async with AsyncExitStack() as taken:
            for leases in self._leases:
                if not await leases.take(lease):
                    return False
                taken.push_async_callback(leases.release, lease)
            held.push_async_exit(taken.pop_all())
            return True
