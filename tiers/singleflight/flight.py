"""Single flight: one generation per key at a time, listened to by everybody who asked for it.

A flight is a log of items. Its producer appends; each listener reads at its own pace from the
first item, so a slow listener holds a position and not a copy. When the last listener goes before
the end, the producer is cancelled. Invariant: the log holds at most `max_bytes`, or one larger
item. Where the next item has no room, the log drops what all have read, after which nobody new is
let in, and makes the producer wait for the slowest listener.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Self

from tiers.entry import Answer, Provenance

logger = logging.getLogger(__name__)

_UNKNOWN = Provenance()


class Flight:
    """One running generation: a log of byte strings, its listeners, and at last its answer."""

    def __init__(self, form: int, max_bytes: int, origin: Provenance) -> None:
        self.encoding = form
        self.provenance = origin
        self.answer: Answer | None = None
        self.collapsed = False
        """Whether another process has generated it."""
        self.age_s = 0.0
        """How old its answer is, as whoever generates it says."""
        self.loads: Mapping[str, str] = {}
        """How loaded whoever generates it is, by the format in which it was asked."""
        self.kept = False
        """Whether its answer is to be stored."""
        self._max_bytes = max_bytes
        self._log: deque[bytes] = deque()
        self._log_bytes = 0
        self._dropped = 0
        self._positions: dict[object, int] = {}
        self._ended = False
        self._error: BaseException | None = None
        self._grown = asyncio.Event()
        self._read = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a new listener would get every item. One that nobody listens to is ending."""
        return self._dropped == 0 and self._error is None and bool(self._positions or self._ended)

    async def publish(self, item: bytes) -> None:
        """Append an item; wait while the log is full and somebody has not read its beginning."""
        while self._log and self._log_bytes + len(item) > self._max_bytes:
            if not self._drop_first_if_read():
                self._read.clear()
                await self._read.wait()
        self._log.append(item)
        self._log_bytes += len(item)
        self._grow()

    def subscribe(self) -> "Subscriber":
        """Return an iterator over all items from the first. It counts as a listener from now on."""
        return Subscriber(self)

    def end(
        self,
        answer: Answer | None = None,
        error: BaseException | None = None,
        *,
        kept: bool = False,
    ) -> None:
        """Tell the listeners that no item follows; `error` is raised to each of them.

        `answer` is the whole of what was published, and `kept` says whether it is to be stored.
        Only the first call counts.
        """
        if not self._ended:
            self._ended, self.answer, self._error, self.kept = True, answer, error, kept
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
    """One reader of a flight. Use it as an async context manager, so that leaving is noticed."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        flight._positions[self] = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        flight = self.flight
        flight._positions.pop(self, None)
        flight._read.set()
        if not flight._positions and not flight._ended and flight.task is not None:
            flight.task.cancel()

    async def __anext__(self) -> bytes:
        flight = self.flight
        while True:
            index = flight._positions[self] - flight._dropped
            if index < len(flight._log):
                flight._positions[self] += 1
                flight._read.set()
                return flight._log[index]
            if flight._ended:
                if flight._error is not None:
                    raise flight._error
                raise StopAsyncIteration
            await flight._grown.wait()


class SingleFlight:
    """The flights that are in the air, by key.

    Args:
        max_bytes: the size of each flight's log.
        purged: tells whether what began under a key has been purged since.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        purged: Callable[[str, Provenance], bool] = lambda _key, _origin: False,
    ) -> None:
        self.max_bytes = max_bytes
        self._purged = purged
        self._by_key: dict[tuple[str, str], Flight] = {}
        self._landing: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def join(
        self,
        key: str,
        encoding: int,
        produce: Callable[[Flight], Awaitable[None]],
        provenance: Provenance = _UNKNOWN,
        *,
        variant: str = "",
    ) -> tuple[Subscriber, bool]:
        """Listen to the flight under `key`, starting it with `produce` if there is none.

        `produce` publishes in `form` and ends the flight; what it raises reaches the listeners.
        A flight stays joinable until `produce` has returned, so what it stores can be found,
        unless it has been purged. `origin` is that of a flight which starts now, and `apart` is
        what keeps it apart from others of its key.

        Returns:
            The listener, and whether it joined a flight that was already under way.
        """
        at = key, variant
        flight = self._by_key.get(at)
        if flight is not None and self._is_open(key, flight):
            return flight.subscribe(), True
        flight = Flight(encoding, self.max_bytes, provenance)
        listener = flight.subscribe()
        self._by_key[at] = flight
        flight.task = task = asyncio.create_task(self._run(flight, produce))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._landed(at, flight, task))
        return listener, False

    def mark_storing(self, key: str, flight: Flight) -> None:
        """Tell that a flight's answer is being stored from now on until its producer returns."""
        self._landing[key] = flight

    def storing(self, key: str) -> Flight | None:
        """Return the flight under `key` whose answer is being stored, the last if there are more.

        Others have been given that answer, so nobody should get an older one that a tier holds.
        """
        flight = self._landing.get(key)
        return flight if flight is not None and self._is_open(key, flight) else None

    def start_background(
        self,
        key: str,
        encoding: int,
        produce: Callable[[Flight], Awaitable[None]],
        origin: Provenance = _UNKNOWN,
    ) -> None:
        """Start a flight that nobody need listen to, unless there is one under `key`."""
        if key not in self:
            listener, _ = self.join(key, encoding, produce, origin)
            task = asyncio.create_task(_read(listener))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def drain(self, timeout_s: float) -> None:
        """Wait for the flights in the air, and cancel those that need longer."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    def __contains__(self, key: object) -> bool:
        return (key, "") in self._by_key

    def __len__(self) -> int:
        return len(self._by_key)

    def _is_open(self, key: str, flight: Flight) -> bool:
        """Whether who asks now may listen."""
        return flight.is_open and not self._purged(key, flight.provenance)

    async def _run(self, flight: Flight, produce: Callable[[Flight], Awaitable[None]]) -> None:
        try:
            await produce(flight)
        except Exception as exc:
            if flight._ended:
                # Nobody listens any more, such as where the answer could not be stored.
                logger.exception("a flight failed after its end")
            flight.end(error=exc)

    def _landed(self, at: tuple[str, str], flight: Flight, task: asyncio.Task[None]) -> None:
        flight.end(error=ConnectionAbortedError("the generation was cancelled"))
        self._tasks.discard(task)
        if self._by_key.get(at) is flight:
            del self._by_key[at]
        key, _ = at
        if self._landing.get(key) is flight:
            del self._landing[key]


async def _read(listener: Subscriber) -> None:
    # Whoever else listens gets the error, too.
    with suppress(Exception):
        async with listener:
            async for _ in listener:
                pass
