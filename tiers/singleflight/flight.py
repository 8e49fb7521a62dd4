"""Single flight: one generation per key at a time, to which all requests for the key subscribe.

A flight is a log of items. Its producer appends; each subscriber reads at its own pace from the
first item, so a slow subscriber holds a position and not a copy. When the last subscriber leaves
before the end, the producer is cancelled. Invariant: the log holds at most `max_bytes`, or one
larger item. Where the next item has no room, the items that every subscriber has read are dropped,
from then on the flight accepts no new subscriber, and the producer waits for the slowest one.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Self

from tiers.entry import Answer, Provenance

logger = logging.getLogger(__name__)

_NO_PROVENANCE = Provenance()
_NO_NOTES: Mapping[str, str] = MappingProxyType({})


class Flight:
    """One running generation: a log of byte strings, its subscribers, and at last its answer.

    Args:
        encoding: of the items, and of the answer.
        max_bytes: of the log.
        provenance: with which the answer is stored.
        is_refresh: whether it replaces an answer that tiers still serve, so that no cache on the
            way to the engine may generate it.
        has_stale: whether tiers hold an older answer, which may be served if it fails.
    """

    def __init__(
        self,
        encoding: int,
        max_bytes: int,
        provenance: Provenance,
        *,
        is_refresh: bool = False,
        has_stale: bool = False,
    ) -> None:
        self.encoding, self.provenance = encoding, provenance
        self.is_refresh, self.has_stale = is_refresh, has_stale
        self.answer: Answer | None = None
        self.collapsed = False
        """Whether another process has generated it."""
        self.age_s = 0.0
        """How old the answer is, where a cache stands before the engine."""
        self.notes = _NO_NOTES
        """What the producer adds for its subscribers; it isn't stored."""
        self.kept = False
        """Whether the answer is to be stored."""
        self._max_bytes = max_bytes
        self._log: deque[bytes] = deque()
        self._log_bytes = 0
        self._dropped = 0
        self._positions: dict[object, int] = {}
        self.has_ended = False
        self._error: BaseException | None = None
        self._grown = asyncio.Event()
        self._read = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a new subscriber would get every item. A flight without subscribers is ending."""
        return (
            self._dropped == 0 and self._error is None and bool(self._positions or self.has_ended)
        )

    async def publish(self, item: bytes) -> None:
        """Append an item; wait while the log is full and a subscriber hasn't read its beginning."""
        while self._log and self._log_bytes + len(item) > self._max_bytes:
            if not self._drop_first_if_read():
                self._read.clear()
                await self._read.wait()
        self._log.append(item)
        self._log_bytes += len(item)
        self._grow()

    def subscribe(self) -> "Subscriber":
        """Return an iterator over all items from the first; it counts as subscribed from now on."""
        return Subscriber(self)

    def end(
        self,
        answer: Answer | None = None,
        error: BaseException | None = None,
        *,
        kept: bool = False,
    ) -> None:
        """End the log; `error` is raised to each subscriber.

        `answer` is the whole of what was published, and `kept` is whether it is to be stored.
        Only the first call counts.
        """
        if not self.has_ended:
            self.has_ended, self.answer, self._error, self.kept = True, answer, error, kept
            self._grow()

    def _drop_first_if_read(self) -> bool:
        if any(position <= self._dropped for position in self._positions.values()):
            return False
        self._log_bytes -= len(self._log.popleft())
        self._dropped += 1
        return True

    def _grow(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


class Subscriber(AsyncIterator[bytes]):
    """One reader of a flight: an async context manager, whose exit unsubscribes it."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        flight._positions[self] = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        flight = self.flight
        flight._positions.pop(self, None)
        flight._read.set()
        if not flight._positions and not flight.has_ended and flight.task is not None:
            flight.task.cancel()

    async def __anext__(self) -> bytes:
        flight = self.flight
        while True:
            index = flight._positions[self] - flight._dropped
            if index < len(flight._log):
                flight._positions[self] += 1
                flight._read.set()
                return flight._log[index]
            if flight.has_ended:
                if flight._error is not None:
                    raise flight._error
                raise StopAsyncIteration
            await flight._grown.wait()

    def take_ready(self, max_bytes: int) -> list[bytes]:
        """Return the next items that are there already: `max_bytes`, or a little more."""
        flight, taken_bytes = self.flight, 0
        taken: list[bytes] = []
        index = flight._positions[self] - flight._dropped
        while index + len(taken) < len(flight._log) and taken_bytes < max_bytes:
            item = flight._log[index + len(taken)]
            taken.append(item)
            taken_bytes += len(item)
        flight._positions[self] += len(taken)
        flight._read.set()
        return taken


Produce = Callable[[Flight], Awaitable[None]]
"""Publishes to a flight and ends it; what it raises reaches the subscribers."""


class SingleFlight:
    """The flights under way, by key.

    Args:
        max_bytes: of each flight's log.
        is_purged: whether what began under a key has been purged since.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        is_purged: Callable[[str, Provenance], bool] = lambda _key, _provenance: False,
    ) -> None:
        self.max_bytes = max_bytes
        self._is_purged = is_purged
        self._flights: dict[tuple[str, str], Flight] = {}
        self._being_stored: dict[str, Flight] = {}
        self.stores_any = self._being_stored.__len__
        """Returns how many answers are being stored. No method, since every hit pays for it."""
        self._tasks: set[asyncio.Task[None]] = set()

    def join(
        self,
        key: str,
        encoding: int,
        produce: Produce,
        provenance: Provenance = _NO_PROVENANCE,
        *,
        variant: str = "",
        is_refresh: bool = False,
        has_stale: bool = False,
        joins_ended: bool = True,
    ) -> tuple[Subscriber, bool]:
        """Subscribe to the flight under `key`, which `produce` starts if there is none.

        A flight stays open until `produce` has returned, so that what it stores can be found,
        unless it is purged. Flights of one key with different `variant` are kept apart. Encoding,
        provenance, `is_refresh` and `has_stale` are those of a flight that starts now. Unless a
        caller `joins_ended` ones, it gets no answer that is only being stored any more.

        Returns:
            The subscriber, and whether it joined a flight that was under way.
        """
        at = key, variant
        flight = self._flights.get(at)
        may_join = flight is not None and (joins_ended or not flight.has_ended)
        if flight is not None and may_join and self._is_open(key, flight):
            return flight.subscribe(), True
        flight = Flight(
            encoding, self.max_bytes, provenance, is_refresh=is_refresh, has_stale=has_stale
        )
        subscriber = flight.subscribe()
        self._flights[at] = flight
        flight.task = task = asyncio.create_task(_run(flight, produce))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._remove(at, flight, task))
        return subscriber, False

    def start_background(
        self, key: str, encoding: int, produce: Produce, provenance: Provenance = _NO_PROVENANCE
    ) -> None:
        """Start a refresh without a caller, unless there is a flight under `key`."""
        if key not in self:
            subscriber, _ = self.join(
                key, encoding, produce, provenance, is_refresh=True, has_stale=True
            )
            task = asyncio.create_task(_read(subscriber))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def mark_being_stored(self, key: str, flight: Flight) -> None:
        """Note that a flight's answer is being stored until its producer returns."""
        self._being_stored[key] = flight

    def being_stored(self, key: str) -> Flight | None:
        """Return the flight under `key` whose answer is being stored, the last if there are more.

        Its subscribers have got that answer, so no caller should get an older one from a tier.
        """
        flight = self._being_stored.get(key)
        return flight if flight is not None and self._is_open(key, flight) else None

    async def drain(self, timeout_s: float) -> None:
        """Wait for the flights under way, and cancel those that take longer."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    def __contains__(self, key: object) -> bool:
        return (key, "") in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    def _is_open(self, key: str, flight: Flight) -> bool:
        return flight.is_open and not self._is_purged(key, flight.provenance)

    def _remove(self, at: tuple[str, str], flight: Flight, task: asyncio.Task[None]) -> None:
        flight.end(error=ConnectionAbortedError("the generation was cancelled"))
        self._tasks.discard(task)
        if self._flights.get(at) is flight:
            del self._flights[at]
        key, _ = at
        if self._being_stored.get(key) is flight:
            del self._being_stored[key]


async def _run(flight: Flight, produce: Produce) -> None:
    try:
        await produce(flight)
    except Exception as exc:
        if flight.has_ended:
            # Subscribers don't get this error, such as where the answer could not be stored.
            logger.exception("a flight failed after its end")
        flight.end(error=exc)


async def _read(subscriber: Subscriber) -> None:
    # Other subscribers get the error, too.
    with suppress(Exception):
        async with subscriber:
            async for _ in subscriber:
                pass
