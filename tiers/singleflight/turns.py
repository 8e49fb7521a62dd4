"""Turns: single flight among processes. Whose turn it is to generate an answer, and who waits.

One process holds the lease and generates; the others look for its answer in the tiers, and for
the lease, which is free when the process ended or what it made was no answer to store. Invariant:
nobody waits longer than `wait_s`, whatever others do.
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
    """Waits for another process, and how they ended since this process started."""

    waiting: int = 0
    """Under way now."""
    answered: int = 0
    """With its answer."""
    took_over: int = 0
    """With its lease, but no answer."""
    gave_up: int = 0
    """With neither, in time."""
    aborted: int = 0
    """Because nobody asked any more."""


class GenerationLock:
    """Gives out turns at generating answers.

    Args:
        chain: where the others' answers appear.
        leases: all of them are taken for a turn, in this order; without any, it is always ours.
        wait_s: the most seconds to wait for others.
        clock: returns seconds that only grow.
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
        self._chain, self._leases, self._wait_s = chain, tuple(leases), wait_s
        self._clock, self._sleep = clock, sleep
        self.stats = LockStats()

    @asynccontextmanager
    async def acquire(
        self, key: str, purge_epoch: int, not_before: float
    ) -> AsyncIterator[Answer | None]:
        """Wait for the turn at `key`, which lasts as long as the context.

        Only those of the same `generation` (see `tiers.purges.purges`) wait for each other: what is
        purged meanwhile is nobody's answer any more.

        Gives the answer that another process has stored meanwhile, after `newer_than` (Unix s);
        `None` asks for one to be generated, and stored before the context ends. With `inf` no
        answer of others will do, so none is waited for.
        """
        async with AsyncExitStack() as turn:
            answer, lease = None, f"{key}.{purge_epoch}"
            is_ours = not self._leases or await self._take(lease, turn)
            if self._leases and not_before < inf:
                # If it is ours, it may have been stored between the lookup and now.
                find = self._chain.find_newer if is_ours else partial(self._wait, lease, turn)
                answer = await find(key, not_before)
            yield answer

    async def close(self) -> None:
        """Give up what is still held."""
        for leases in self._leases:
            await leases.close()

    async def _wait(
        self, lease: str, turn: AsyncExitStack, key: str, newer_than: float
    ) -> Answer | None:
        waits, until, poll_s = self.stats, self._clock() + self._wait_s, _FIRST_POLL_S
        waits.waiting += 1
        try:
            while (left_s := until - self._clock()) > 0:
                await self._sleep(min(poll_s, left_s))
                poll_s = min(poll_s * _GROWTH, _LAST_POLL_S)
                is_ours = await self._take(lease, turn)
                # In this order: what is stored before a lease is released is found after it.
                answer = await self._chain.find_newer(key, newer_than)
                if answer is not None:
                    waits.answered += 1
                    return answer
                if is_ours:
                    waits.took_over += 1
                    return None
        except asyncio.CancelledError:
            waits.aborted += 1
            raise
        finally:
            waits.waiting -= 1
        waits.gave_up += 1
        return None

    async def _take(self, lease: str, turn: AsyncExitStack) -> bool:
        async with AsyncExitStack() as taken:
            for leases in self._leases:
                if not await leases.take(lease):
                    return False
                taken.push_async_callback(leases.release, lease)
            turn.push_async_exit(taken.pop_all())
            return True
