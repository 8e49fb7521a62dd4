"""The cache as one operation: serve an answer, join its generation, or have it generated.

    answers = AnswerCache(chain, SingleFlight(max_bytes=...), GenerationLock(chain, [], wait_s=0))
    found = await answers.get_or_generate(key, Generate)

Invariant: of all callers that request a key at the same time one generates, in this process and, as
far as leases reach, in all others; no caller gets an older answer than one that others got before.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from math import inf
from typing import Literal, NamedTuple, Protocol

from tiers.acceptance import ANY, Acceptance
from tiers.chain import Chain, Hit
from tiers.entry import Answer, Freshness, State
from tiers.singleflight.flight import Flight, SingleFlight, Subscriber
from tiers.singleflight.lock import GenerationLock

# Above, callers who wait for an answer need the engine more than a refresh does.
_MAX_REFRESHES = 32


class Decision(Enum):
    """How a request is answered."""

    SERVE = "serve"
    """It gets what a tier holds."""
    JOIN_STORED = "join"
    """It gets an answer that is complete and is still being stored."""
    GENERATE = "generate"
    """It waits for an answer that it generates, or that another request is generating."""
    REFUSE = "refuse"
    """It accepts only what a tier holds, and none holds it."""


# Python 3.11 takes 80 ns to look up a member of an enumeration, which every hit would pay for.
_SERVE = Decision.SERVE


def decide(
    hit: Hit | None, acceptance: Acceptance, being_stored: Answer | None, now: float
) -> Decision:
    """Return how a request is answered.

    Args:
        hit: what the tiers have found.
        acceptance: what the caller accepts.
        being_stored: an answer under the same key that other callers have got, and that no tier may
            hold yet: what a tier holds instead is older.
        now: Unix seconds.
    """
    if being_stored is not None and _joins(hit, acceptance, being_stored):
        return Decision.JOIN_STORED
    if hit is not None and acceptance.accepts(hit.entry, hit.state, now):
        return _SERVE
    return Decision.REFUSE if acceptance.only_if_cached else Decision.GENERATE


def _joins(hit: Hit | None, acceptance: Acceptance, being_stored: Answer) -> bool:
    if acceptance.no_cache or acceptance.limits_age:
        return False
    return hit is None or hit.entry.answer != being_stored


Reason = Literal["miss", "request", "stale"]
"""Why an answer is generated, in the words of RFC 9211, section 2.2."""


def reason_of(hit: Hit | None, acceptance: Acceptance) -> Reason:
    """Return why an answer is generated although `hit` was found."""
    if acceptance.no_cache or (hit is not None and hit.state is State.FRESH):
        return "request"
    return "stale" if hit is not None else "miss"


def not_before(hit: Hit | None, acceptance: Acceptance, now: float) -> float:
    """Return the time (Unix s) after which another process must have stored an answer to use it.

    With `inf` no stored answer is used: the engine has to generate one.
    """
    if acceptance.no_cache:
        return inf
    if acceptance.limits_age:
        return now
    return 0 if hit is None else hit.entry.stored_at


class Generation(Protocol):
    """How an answer is generated for a caller."""

    @property
    def encoding(self) -> int:
        """The encoding in which it generates; answers of other processes are converted to it."""

    @property
    def labels(self) -> Iterable[str]:
        """The labels by which its answer may be purged, beside its key."""

    @property
    def variant(self) -> str:
        """Only generations of one key and one variant are shared."""

    @property
    def can_refresh(self) -> bool:
        """Whether a background refresh could be generated now."""

    async def generate(self, flight: Flight) -> Freshness | None:
        """Publish to `flight` what is generated, and end it.

        Returns for how long the answer is to be kept; `None` if it isn't.
        """

    async def convert(self, answer: Answer) -> Answer | None:
        """Return another process's answer in our encoding, or `None` if it can't be converted."""


class Pending(NamedTuple):
    """An answer that is being generated. Read it through the subscriber, as a context manager."""

    subscriber: Subscriber
    reason: Reason
    joined: bool
    """Whether another request had started its generation."""
    stale: Hit | None
    """What may be served if the generation fails, unless it is purged meanwhile."""

    @property
    def collapsed(self) -> bool:
        """Whether another request generates it, in this process or in another."""
        return self.joined or self.subscriber.flight.collapsed


class AnswerCache:
    """A chain of tiers with single flight.

    Args:
        chain: where answers are looked up and stored.
        flights: the generations of this process.
        lock: lets one process at a time generate under a key.
        clock: a monotonic clock in seconds, which measures how long a generation takes.
    """

    def __init__(
        self,
        chain: Chain,
        flights: SingleFlight,
        lock: GenerationLock,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.chain, self._flights, self._lock, self._clock = chain, flights, lock, clock

    def find_at_once(self, key: str, encoding: int, now: float) -> Hit | None:
        """Return a fresh entry that may be served without anything else to do, and count it.

        `None` says that `get_or_generate` is to be called, which hasn't been anticipated in
        anything. It is for callers that accept any fresh answer in an encoding, which requests of
        one key may ask for in turn; `now` are Unix seconds.
        """
        if self._flights.stores_any() and self._flights.being_stored(key) is not None:
            return None
        return self.chain.find_at_once(key, encoding, now)

    async def get_or_generate(
        self, key: str, begin: Callable[[], Generation], acceptance: Acceptance = ANY
    ) -> Hit | Pending | None:
        """Return what a tier holds, or else what is being generated.

        A hit that is stale, or soon will be, is refreshed in the background. Returns `None` if the
        caller accepts only what a tier holds, and none holds it. `begin` returns the generation; it
        is called only where one may be needed.
        """
        hit = None if acceptance.no_cache else await self.chain.lookup(key)
        flight, now = self._flights.being_stored(key), self.chain.clock()
        decision = decide(hit, acceptance, None if flight is None else flight.answer, now)
        if decision is _SERVE and hit is not None:
            if hit.refresh:
                self._refresh(key, begin(), hit)
            return hit
        stale = None if acceptance.limits_age else hit
        if decision is Decision.JOIN_STORED and flight is not None:
            return Pending(flight.subscribe(), "miss", joined=True, stale=stale)
        if decision is Decision.REFUSE:
            return None
        generation = begin()
        run = partial(self._run, key, generation, not_before(hit, acceptance, now))
        subscriber, joined = self._flights.join(
            key,
            generation.encoding,
            run,
            self.chain.provenance(generation.labels),
            variant=generation.variant,
            has_stale=stale is not None,
            # One that has ended is older than the request for a newer one.
            joins_ended=not acceptance.no_cache,
        )
        return Pending(subscriber, reason_of(hit, acceptance), joined, stale)

    def is_purged(self, key: str, hit: Hit) -> bool:
        """Return whether a hit was purged since it was found."""
        return self.chain.purges.is_purged(key, hit.entry)

    def _refresh(self, key: str, generation: Generation, hit: Hit) -> None:
        if generation.can_refresh and len(self._flights) < _MAX_REFRESHES:
            self._flights.start_background(
                key,
                generation.encoding,
                partial(self._run, key, generation, hit.entry.stored_at),
                self.chain.provenance(generation.labels),
            )

    async def _run(
        self, key: str, generation: Generation, not_before: float, flight: Flight
    ) -> None:
        """Publish what another process has generated, or else generate it, and store it."""
        epoch = flight.provenance.purge_epoch
        async with self._lock.acquire(key, epoch, not_before) as answer:
            if answer is not None and answer.encoding != flight.encoding:
                answer = await generation.convert(answer)
            if answer is None:
                await self._generate(key, generation, flight)
                return
        flight.collapsed = True
        await flight.publish(answer.content)
        flight.end(answer, kept=True)

    async def _generate(self, key: str, generation: Generation, flight: Flight) -> None:
        started = self._clock()
        freshness = await generation.generate(flight)
        if freshness is not None and flight.answer is not None:
            self._flights.mark_being_stored(key, flight)
            # The callers who wait get the answer first.
            await asyncio.sleep(0)
            await self.store(key, flight, flight.answer, freshness, self._clock() - started)

    async def store(
        self, key: str, flight: Flight, answer: Answer, freshness: Freshness, generation_s: float
    ) -> None:
        """Store the answer of a flight that has ended."""
        await self.chain.store(
            key,
            answer,
            freshness,
            provenance=flight.provenance,
            generation_s=generation_s,
            age_s=flight.age_s,
        )
