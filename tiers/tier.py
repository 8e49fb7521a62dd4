"""A tier: any aiocache backend with a name and a deadline.

The one place that catches a backend's failure, counts it, and makes it a miss, since a cache must
never fail a request. Cancellation passes through.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiocache.base import BaseCache

from tiers.backend import ByteCache
from tiers.entry import Entry
from tiers.purges.purges import Purges
from tiers.resilience.bulkhead import Bulkhead, BusyError
from tiers.resilience.circuit_breaker import FAILURES, CircuitBreaker
from tiers.resilience.failed_writes import FailedWrites
from tiers.server_clock import ServerClock

logger = logging.getLogger(__name__)

_WRITE_S = 1.0
PATIENT_S = 0.25
"""Seconds that what saves a generation may take, where a generation would begin otherwise."""
# Each takes a connection. One process hardly makes more calls at once, even to a quick server.
_MAX_READS = 8
_MAX_WRITES = 4
_PROBE_KEY = "probe"


@dataclass(slots=True)
class Counts:
    """What has happened at a tier since the process started."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    promotions: int = 0
    """Stores of entries that a farther tier had."""
    demotions: int = 0
    """Stores of entries that a nearer tier evicted."""
    errors: int = 0
    busy: int = 0
    """Calls that weren't made, because too many were under way."""


class Tier:
    """A named level of the chain.

    A remote backend isn't called after failures in a row, until a probe succeeds. An entry that a
    failed write should have replaced is a miss.

    Args:
        name: its name in reports.
        backend: an aiocache backend that stores bytes.
        deadline_s: seconds that one read may take; a write may take a second, since nobody waits
            for it. 0 for a backend that answers at once.
        shared: whether other machines use it too, so that new answers are stored there at once.
        server_clock: that of the backend's server, by which it keeps the times of entries; by
            default the same as ours.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        name: str,
        backend: BaseCache,
        *,
        deadline_s: float = 0,
        shared: bool = False,
        server_clock: ServerClock | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.backend = backend
        self.deadline_s = deadline_s
        self.shared = shared
        self._write_s = max(deadline_s, _WRITE_S) if deadline_s else 0
        self._clock, self.server_clock = clock, server_clock
        self.local = backend if isinstance(backend, ByteCache) else None
        """The backend if it is one of ours, which answers at once: reads skip aiocache's layers,
        which cost more than the read."""
        self.note_read = _ignore if self.local is None else self.local.note_read
        """Counts as read what `find_at_once` has returned."""
        self._reads = Bulkhead(_MAX_READS, deadline_s, limit_s=self._write_s)
        self._writes = Bulkhead(_MAX_WRITES, self._write_s, limit_s=self._write_s)
        self._probes = Bulkhead(1, deadline_s, limit_s=self._write_s)
        self._breaker = CircuitBreaker(self._probe, self._answers_again)
        self._failed_writes = FailedWrites()
        self._failing: dict[str, int] = {}
        self.counts = Counts()

    @property
    def available(self) -> bool:
        """Whether the backend is called; it isn't for a while after failures in a row."""
        return not self._breaker.is_open

    @property
    def in_memory(self) -> bool:
        """Whether entries are in this process alone: a write waits for nothing."""
        return self.local is not None and self.local.in_memory

    @property
    def is_open(self) -> bool:
        """Whether entries can be read, which they can't while a file is being verified."""
        return self.local is None or self.local.is_open

    async def connect(self) -> None:
        """Open the connections that lookups take, which couldn't do it within their deadline."""
        if self.deadline_s:
            probes = [self.backend.exists(_PROBE_KEY, timeout=_WRITE_S) for _ in range(_MAX_READS)]
            await asyncio.gather(*probes, return_exceptions=True)

    async def opened(self) -> None:
        """Return when entries can be read.

        Raises:
            OSError: they never can.
        """
        if self.local is not None:
            await self.local.opened()

    def find_at_once(self, key: str, now: float, purges: Purges) -> Entry | None:
        """Return the entry under `key` in this process; counts nothing.

        `None` also stands for a tier that fails, or that has to be waited for: `get` then does what
        there is to do.

        Args:
            key: its key.
            now: Unix seconds.
            purges: a purged entry counts as none.
        """
        if self.local is None or self._failing or not self._failed_writes.is_empty:
            return None
        try:
            entry = self.local.peek_entry(key, now)
        except Exception:
            # `get` fails as well, and reports why.
            return None
        return None if entry is None or purges.is_purged(key, entry) else entry

    async def get(self, key: str, purges: Purges, *, counted: bool = True) -> Entry | None:
        """Return the entry under `key`, or `None` if there is none.

        A purged entry counts as none. Unless `counted`, the call is neither a hit nor a miss, but
        by a caller that generates otherwise: it may take `PATIENT_S`, with the breaker open, too.
        """
        try:
            entry = await self._read_entry(key, purges, is_patient=not counted)
        except ValueError as exc:
            # From another version of ours, or damaged; the next answer replaces it.
            logger.debug("the %s tier holds an entry that can't be read: %s", self.name, exc)
            entry = None
        except Exception as exc:
            self._record_failure("read", exc)
            return None
        if self._failing:
            self._failing.pop("read", None)
        if entry is not None:
            failed = self._failed_writes
            is_stale = not failed.is_empty and failed.may_be_stale(key, entry.stored_at)
            if not is_stale and not purges.is_purged(key, entry):
                self.counts.hits += counted
                return entry
        self.counts.misses += counted
        return None

    async def peek(self, key: str) -> Entry | None:
        """Return the entry under `key`, or `None`. Doesn't count as a request for it."""
        try:
            if self.local is not None:
                entry = self.local.peek_entry(key, self.local.clock())
            else:
                entry = await self._read(key) if self.available else None
            if entry is None or self._failed_writes.may_be_stale(key, entry.stored_at):
                return None
            return entry
        except ValueError:
            # From another version of ours, or damaged.
            return None
        except Exception as exc:
            self._record_failure("read", exc)
            return None

    async def put(self, key: str, value: bytes, ttl_s: float) -> bool:
        """Store an encoded entry for `ttl_s` seconds. Returns whether it is stored."""
        stored, may_be_older = False, True
        try:
            # Other machines wait for it, whose reads may be quicker.
            if self.available or self.shared:
                sent = self._by_server_clock(value)
                write = partial(self.backend.set, key, sent, ttl=ttl_s, timeout=0)
                stored = await self._write("write", write)
                may_be_older = not stored and await self._holds_other(key, value)
        except Exception as exc:
            self._record_failure("write", exc)
        finally:
            if may_be_older:
                self._failed_writes.add(key, self._stored_at(value))
            elif key in self._failed_writes:
                self._note_success(key, self._stored_at(value))
        self.counts.stores += stored
        return stored

    def forgo(self, key: str, value: bytes) -> None:
        """Hide what the tier holds under `key`, which an encoded entry should have replaced."""
        self._failed_writes.add(key, self._stored_at(value))

    async def remove(self, key: str) -> None:
        """Drop the entry under `key`, if there is one."""
        removed = False
        try:
            if self.available:
                remove = partial(self.backend.delete, key, timeout=0)
                await self._write("remove", remove)
                removed = True
        except Exception as exc:
            self._record_failure("remove", exc)
        finally:
            if not removed:
                self._failed_writes.add(key, self._clock())
            elif key in self._failed_writes:
                self._note_success(key, self._clock())

    async def holds(self, key: str) -> bool:
        """Return whether there is an entry under `key`. Doesn't count as a request for it.

        Returns `True` if the tier fails, so that nothing is copied to it.
        """
        if not self.available:
            return True
        if key in self._failed_writes:
            return False
        try:
            return await self._exists(key)
        except Exception as exc:
            self._record_failure("read", exc)
            return True

    def victim(self, value_bytes: int) -> str | None:
        """Return the key that would be evicted first for a value of that size, `None` if none."""
        return None if self.local is None else self.local.victim(value_bytes)

    def entries(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Yield key, encoded entry and expiry (Unix s) of all, if the backend can list them."""
        return iter(()) if self.local is None else self.local.entries()

    async def close(self) -> None:
        """Flush and release the backend."""
        await self._breaker.close()
        await self._probes.close()
        await self._reads.close()
        await self._writes.close()
        try:
            await self.backend.close(timeout=self._write_s)
        except Exception as exc:
            self.counts.errors += 1
            logger.error("the %s tier failed to close: %r", self.name, exc)

    async def _read_entry(self, key: str, purges: Purges, *, is_patient: bool) -> Entry | None:
        """Return what the backend holds, unless it can't be called now.

        Raises:
            ValueError: it is no entry.
        """
        if self.local is not None:
            return self.local.read_entry(key)
        if self._breaker.is_open and not is_patient:
            return None
        if self.shared and purges.shared_unknown:
            # Other machines may have purged it.
            return None
        return await self._read(key, is_patient=is_patient)

    async def _read(self, key: str, *, is_patient: bool = False) -> Entry | None:
        value: bytes | None
        if self.deadline_s:
            read = partial(self.backend.get, key, timeout=0)
            deadline_s = max(PATIENT_S, self.deadline_s) if is_patient else None
            value = await self._reads.run(read, deadline_s=deadline_s)
        else:
            value = await self.backend.get(key)
        self._breaker.succeeded()
        if value is None:
            return None
        entry = Entry.decode_untrusted(value)
        return entry if self.server_clock is None else entry.later_by(-self.server_clock.ahead_s)

    def _by_server_clock(self, value: bytes) -> bytes:
        if self.server_clock is None or not self.server_clock.ahead_s:
            return value
        return Entry.decode(value).later_by(self.server_clock.ahead_s).encode()

    async def _write(self, action: str, write: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        done = bool(await (self._writes.run(write) if self.deadline_s else write()))
        self._breaker.succeeded()
        self._failing.pop(action, None)
        return done

    async def _exists(self, key: str) -> bool:
        if self.local is not None:
            return self.local.holds(key)
        return bool(await self.backend.exists(key, timeout=self._write_s))

    async def _holds_other(self, key: str, value: bytes) -> bool:
        if self.local is None:
            return await self._exists(key)
        # A value that waits for the disk tier's file to be opened is readable, though not stored.
        held = self.local.peek(key)
        return held is not None and held[0] != value

    def _note_success(self, key: str, stored_at: float) -> None:
        """Record that a write has succeeded after an earlier one had failed."""
        if self.local is not None:
            self._failed_writes.discard(key)
        else:
            # The write that failed may still arrive there.
            self._failed_writes.add(key, stored_at)

    def _stored_at(self, value: bytes) -> float:
        try:
            return Entry.decode(value).stored_at
        except ValueError:
            return self._clock()

    async def _probe(self) -> None:
        # The first call may have to connect, so only the second one is held to the deadline.
        await self.backend.exists(_PROBE_KEY, timeout=_WRITE_S)
        if self.deadline_s:
            await self._probes.run(partial(self.backend.exists, _PROBE_KEY, timeout=0))

    def _answers_again(self) -> None:
        logger.warning("the %s tier answers again", self.name)

    def _record_failure(self, action: str, exc: Exception) -> None:
        """Count a failure, and log it once until the same action succeeds."""
        if isinstance(exc, BusyError):
            self.counts.busy += 1
            return
        self.counts.errors += 1
        in_a_row = self._failing[action] = self._failing.get(action, 0) + 1
        if self.local is not None:
            if in_a_row == 1:
                # An operating system's error needs no traceback.
                trace = None if isinstance(exc, OSError) else exc
                logger.error("the %s tier failed to %s: %s", self.name, action, exc, exc_info=trace)
        elif self._breaker.failed():
            text = "the %s tier failed to %s and is left out until it answers again: %r"
            logger.error(text, self.name, action, exc)
        elif in_a_row == FAILURES and self.available:
            # Another action succeeds in between, so the breaker stays closed.
            logger.error("the %s tier fails to %s: %r", self.name, action, exc)


def _ignore(_: str) -> None:
    """Do nothing."""
