"""Purges that many machines share, through one value in the shared tier's server.

The value is a `PurgeTable`, in base64 because aiocache's Redis backend compares text. Each process
polls it, merges it with its own table, and writes back what it lacks; a server that has lost the
value gets it back. Only compare-and-set replaces it, so no two purges get the same epoch; purges
that were made without the server get later ones when it is told. A process takes nothing from the
shared tier until it has read the value, nor while it can't. One that stood still for so long that
it may have missed a purge reads it before it answers.
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
from tiers.server_clock import ServerClock

logger = logging.getLogger(__name__)

_KEY = "purges"
_ATTEMPTS = 8
# A poll that ends so much later than its deadline shows that the process stood still.
_STOOD_STILL_S = 0.1


class SharedPurges:
    """Keeps the purges of this process and those in a server in step.

    Args:
        purges: those of this process.
        backend: an aiocache backend that returns the bytes that it was given.
        every_s: seconds between two polls of the server.
        deadline_s: seconds that one poll, with its writes, may take.
        server_clock: is kept up to date by the polls.
        withholds: whether nothing is served while the server can't be polled, since other machines
            may have purged it; else what this machine's own tiers hold is.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        purges: Purges,
        backend: BaseCache,
        *,
        every_s: float = 0.2,
        deadline_s: float = 0.5,
        server_clock: ServerClock | None = None,
        withholds: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.errors = 0
        """How many polls of the server have failed."""
        self._purges, self._backend = purges, backend
        self._every_s, self._deadline_s, self._clock = every_s, deadline_s, clock
        # After this time every other process has begun and ended a poll: one may just have begun.
        self._known_after_s = every_s + 2 * deadline_s
        self._server_clock, self._withholds = server_clock, withholds
        self._polled_at = inf
        self._catching_up = asyncio.Lock()
        self._known: PurgeTable | None = None
        """The last table that both the server and this process had, as far as is known."""
        self._data = b""
        """The same as it is in the server."""
        self._is_failing = False
        purges.shared_unknown = True

    @property
    def is_behind(self) -> bool:
        """Whether others may rely on this process knowing a purge that it doesn't know."""
        return self._clock() - self._polled_at > self._known_after_s and not self._is_failing

    async def catch_up(self) -> None:
        """Poll the server, once for all callers that find it `is_behind`."""
        async with self._catching_up:
            if self.is_behind:
                await self.sync()

    async def run(self) -> None:
        """Poll the server until cancelled."""
        while True:
            await self.sync()
            await asyncio.sleep(self._every_s)

    async def sync(self) -> bool:
        """Merge the purges of others, and write those they lack. Returns whether that succeeded.

        Failures are counted, and logged once until a poll succeeds.
        """
        return await self._poll()

    async def purge(self, *labels: str) -> None:
        """Purge as `Purges.purge` does, and on all machines that reach the server.

        Raises:
            ValueError: one isn't a label, or there are too many.
            PurgeError: the disk tier or the server could not store the purge in time; it holds on
                this machine, and elsewhere once the server answers.
        """
        check_labels(labels)
        if not await self._poll(labels):
            if self._known is None:
                # What is purged now is new to the server, whatever that has.
                self._known = self._purges.table
            await self._purges.purge(*labels)
            raise PurgeError("the shared tier could not store the purge; it holds on this machine")
        await asyncio.sleep(self._known_after_s)

    async def _poll(self, labels: Sequence[str] = ()) -> bool:
        began = self._clock()
        try:
            try:
                await self._exchange_in_time(labels)
            except Exception:
                if self._clock() - began < self._deadline_s + _STOOD_STILL_S:
                    raise
                # The server may well have answered, and others may rely on us knowing what.
                began = self._clock()
                await self._exchange_in_time(labels)
        except Exception as exc:
            self._record_failure(exc)
            return False
        self._record_success(began)
        return True

    async def _exchange_in_time(self, labels: Sequence[str]) -> None:
        async with asyncio.timeout(self._deadline_s):
            await self._exchange(labels)

    def _record_failure(self, exc: Exception) -> None:
        self.errors += 1
        self._purges.shared_unknown, self._purges.withholds = True, self._withholds
        if not self._is_failing:
            self._is_failing = True
            logger.error("purges can't be shared with other machines: %r", exc)

    def _record_success(self, began: float) -> None:
        self._polled_at = began
        self._purges.shared_unknown = self._purges.withholds = False
        if self._is_failing:
            self._is_failing = False
            logger.warning("purges are shared with other machines again")

    async def _exchange(self, labels: Sequence[str]) -> None:
        if self._server_clock is not None:
            await self._server_clock.observe()
        for _ in range(_ATTEMPTS):
            data = await self._backend.get(_KEY)
            if data is not None and data != self._data:
                # Only a purge waits for the disk, since its caller learns whether it lasts.
                await self._merge(data, awaits_opening=bool(labels))
            known = PurgeTable() if data is None or self._known is None else self._known
            if known.merged(self._purges.current()) is not known:
                # Such as purges made without the server, by another process or before a restart.
                await self._purges.merge(known, known, awaits_opening=bool(labels))
            elif not labels:
                return
            # The purge holds here only once the server has it. Else an answer could begin that
            # knows this purge but not an earlier one of another machine.
            merged = self._purges.with_purge(labels) if labels else self._purges.table
            packed = b64encode(merged.pack())
            if await self._compare_and_set(data, packed):
                await self._merge(packed)
                return
        raise TimeoutError(f"other machines replaced the purges {_ATTEMPTS} times meanwhile")

    async def _merge(self, data: bytes, *, awaits_opening: bool = True) -> None:
        table = self._purges.read(_decoded(data))
        known = self._purges.table if self._known is None else self._known
        await self._purges.merge(table, known, awaits_opening=awaits_opening)
        self._data, self._known = data, table

    async def _compare_and_set(self, expected: bytes | None, packed: bytes) -> bool:
        """Write `packed` if the server holds `expected`. Returns whether it is written."""
        if expected is None:
            try:
                return bool(await self._backend.add(_KEY, packed, ttl=None))
            except ValueError:
                return False
        async with OptimisticLock(self._backend, _KEY) as lock:
            if await self._backend.get(_KEY) != expected:
                return False
            try:
                return bool(await lock.cas(packed, ttl=None))
            except OptimisticLockError:
                return False


def _decoded(data: bytes) -> bytes:
    try:
        return b64decode(data, validate=True)
    except ValueError:
        return b""
