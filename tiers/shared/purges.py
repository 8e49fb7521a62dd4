"""Purges that many machines share, through one value in a server of theirs.

The value is the table of `tiers.purges.purges`, in base64 since aiocache's Redis backend compares
text. It is read again and again, merged, and given what it lacks; a server that has lost it gets it
back. It is only ever replaced by who has read it (compare-and-set), so a number is given once.
Until it has been read, nothing of a shared tier is given out. A process that stood still for so
long that it may have missed a purge looks before it answers.
"""

import asyncio
import logging
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from math import inf

from aiocache.base import BaseCache
from aiocache.lock import OptimisticLock, OptimisticLockError

from tiers.purges.purges import PurgeError, Purges
from tiers.purges.table import PurgeTable, check_labels
from tiers.resilience.bulkhead import in_time

logger = logging.getLogger(__name__)

_KEY = "purges"
_ATTEMPTS = 8


class SharedPurges:
    """Keeps a process's purges and a server's alike.

    Args:
        purges: this process's.
        backend: any aiocache backend that gives back the bytes that it was given.
        every_s: the time between two looks at the server.
        deadline_s: seconds that one look, with what is written then, may take.
        clock: returns seconds that always pass.
    """

    def __init__(
        self,
        purges: Purges,
        backend: BaseCache,
        *,
        every_s: float = 0.2,
        deadline_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.errors = 0
        """How many looks at the server failed."""
        self._purges, self._backend = purges, backend
        self._every_s, self._deadline_s, self._clock = every_s, deadline_s, clock
        # By then all others have begun and ended a look, the one before having just begun too soon.
        self._known_after_s = every_s + 2 * deadline_s
        self._looked_at = inf
        self._catching_up = asyncio.Lock()
        self._known, self._table = b"", PurgeTable()
        self._is_failing = False
        purges.shared_unknown = True

    @property
    def is_behind(self) -> bool:
        """Whether others may take a purge for known here that isn't, unless the server fails."""
        return self._clock() - self._looked_at > self._known_after_s and not self._is_failing

    async def catch_up(self) -> None:
        """Look at the server once for all who find that it `is_behind`."""
        async with self._catching_up:
            if self.is_behind:
                await self.sync()

    async def run(self) -> None:
        """Look at the server again and again, until cancelled."""
        while True:
            await self.sync()
            await asyncio.sleep(self._every_s)

    async def sync(self) -> bool:
        """Take over what others have purged, and tell them the rest. Returns whether that is done.

        What fails is counted, and said once until it succeeds.
        """
        return await self._exchange_in_time()

    async def purge(self, *labels: str) -> None:
        """Purge as `Purges.purge` does, and on all machines that reach the server.

        Raises:
            ValueError: one can't be a label, or they are too many.
            PurgeError: it could not be made to last, or the server not be told in time; it holds on
                this machine, and elsewhere once the server answers.
        """
        check_labels(labels)
        if not await self._exchange_in_time(labels):
            await self._purges.purge(*labels)
            raise PurgeError(
                "the shared tier could not be told of the purge; it holds on this machine"
            )
        await asyncio.sleep(self._known_after_s)

    async def _exchange_in_time(self, labels: Sequence[str] = ()) -> bool:
        began = self._clock()
        try:
            await in_time(self._exchange(labels), self._deadline_s)
        except Exception as exc:
            self.errors += 1
            if not self._is_failing:
                self._is_failing = True
                logger.error("purges can't be shared with other machines: %r", exc)
            return False
        self._looked_at = began
        if self._is_failing:
            self._is_failing = False
            logger.warning("purges are shared with other machines again")
        return True

    async def _exchange(self, labels: Sequence[str]) -> None:
        for _ in range(_ATTEMPTS):
            data = await self._backend.get(_KEY)
            if data is not None and data != self._known:
                # Who purges is told whether it will last; nobody else need wait for the disk.
                await self._merge(data, awaits_opening=bool(labels))
            self._purges.shared_unknown = False
            known = PurgeTable() if data is None else self._table
            # Here the purge holds only once it is there, so that nothing can begin here that knows
            # of it and not of what others have purged before.
            wanted = self._purges.with_purge(labels) if labels else self._purges.table
            if known.merged(wanted) is known:
                return
            made = b64encode(wanted.pack())
            if await self._is_replaced(data, made):
                await self._merge(made)
                return
        raise TimeoutError("others wrote at the same time, again and again")

    async def _merge(self, data: bytes, *, awaits_opening: bool = True) -> None:
        table = self._purges.read(_decoded(data))
        await self._purges.merge(table, awaits_opening=awaits_opening)
        self._known, self._table = data, table

    async def _is_replaced(self, data: bytes | None, made: bytes) -> bool:
        """Write `made` in place of `data`, and of nothing else. Returns whether it is written."""
        if data is None:
            try:
                return bool(await self._backend.add(_KEY, made, ttl=None))
            except ValueError:
                return False
        async with OptimisticLock(self._backend, _KEY) as lock:
            if await self._backend.get(_KEY) != data:
                return False
            try:
                return bool(await lock.cas(made, ttl=None))
            except OptimisticLockError:
                return False


def _decoded(data: bytes) -> bytes:
    try:
        return b64decode(data, validate=True)
    except ValueError:
        return b""
