"""The cache as one operation: who is served, who joins, who generates, and who is refused."""

import asyncio
from math import inf

import pytest

from tests.tiers.conftest import JSON, SSE
from tests.waiting import HANGS_S
from tiers import Answer, Chain, Entry, Flight, FrequencySketch, Freshness, Hit, MemoryCache, State
from tiers.acceptance import ANY, Acceptance
from tiers.answer_cache import AnswerCache, Decision, Pending, decide, not_before, reason_of
from tiers.singleflight.flight import SingleFlight
from tiers.singleflight.lock import GenerationLock
from tiers.tier import Tier

OLD, NEW = Answer(JSON, b"old"), Answer(JSON, b"new")
NO_CACHE, ONLY_IF_CACHED = Acceptance(no_cache=True), Acceptance(only_if_cached=True)
HUNDRED_S = Freshness(100)
YOUNG, STALE_TOO = Acceptance(max_age_s=10), Acceptance(max_stale_s=inf)


def hit(state: State = State.FRESH, answer: Answer = OLD) -> Hit:
    """Stored at 0, fresh until 100, served stale until 150, and on errors until 200."""
    return Hit(Entry(answer, 0, 100, 0, 50, 100), "memory", state)


@pytest.mark.parametrize(
    ("found", "acceptance", "being_stored", "now", "decision"),
    [
        (None, ANY, None, 50, Decision.GENERATE),
        (None, ONLY_IF_CACHED, None, 50, Decision.REFUSE),
        (hit(), ANY, None, 50, Decision.SERVE),
        (hit(), ONLY_IF_CACHED, None, 50, Decision.SERVE),
        (hit(), NO_CACHE, None, 50, Decision.GENERATE),
        (hit(), YOUNG, None, 50, Decision.GENERATE),
        (hit(), YOUNG, None, 10, Decision.SERVE),
        (hit(), Acceptance(max_age_s=10, only_if_cached=True), None, 50, Decision.REFUSE),
        (hit(State.STALE_WHILE_REVALIDATE), ANY, None, 120, Decision.SERVE),
        (hit(State.STALE_IF_ERROR), ANY, None, 170, Decision.GENERATE),
        (hit(State.STALE_IF_ERROR), STALE_TOO, None, 170, Decision.SERVE),
        # Others have got the new answer already.
        (None, ANY, NEW, 50, Decision.JOIN_STORED),
        (hit(), ANY, NEW, 50, Decision.JOIN_STORED),
        (hit(answer=NEW), ANY, NEW, 50, Decision.SERVE),
        (None, ONLY_IF_CACHED, NEW, 50, Decision.JOIN_STORED),
        (None, NO_CACHE, NEW, 50, Decision.GENERATE),
        (hit(), YOUNG, NEW, 10, Decision.SERVE),
    ],
)
def test_decision(
    found: Hit | None,
    acceptance: Acceptance,
    being_stored: Answer | None,
    now: float,
    decision: Decision,
) -> None:
    assert decide(found, acceptance, being_stored, now) is decision


@pytest.mark.parametrize(
    ("found", "acceptance", "reason", "since"),
    [
        (None, ANY, "miss", 0),
        (hit(), NO_CACHE, "request", inf),
        (hit(), YOUNG, "request", 50),
        (hit(State.STALE_IF_ERROR), ANY, "stale", 0),
    ],
)
def test_reason(found: Hit | None, acceptance: Acceptance, reason: str, since: float) -> None:
    assert reason_of(found, acceptance) == reason
    assert not_before(found, acceptance, 50) == since


class Generation:
    """Generates `NEW` when it is allowed to, and counts how often."""

    def __init__(self, freshness: Freshness | None = HUNDRED_S, encoding: int = JSON) -> None:
        self.encoding, self.labels, self.variant = encoding, ("model:m",), ""
        self.can_refresh = True
        self.freshness, self.times, self.refreshes = freshness, 0, 0
        self.go = asyncio.Event()
        self.go.set()
        self.error: Exception | None = None

    async def generate(self, flight: Flight) -> Freshness | None:
        self.times += 1
        self.refreshes += flight.is_refresh
        await self.go.wait()
        if self.error is not None:
            raise self.error
        await flight.publish(NEW.content)
        flight.end(NEW, kept=self.freshness is not None)
        return self.freshness

    async def convert(self, answer: Answer) -> Answer | None:
        return answer._replace(encoding=self.encoding)


class House:
    """An answer cache over one memory tier, whose time only tests move."""

    def __init__(self) -> None:
        self.now = 1000.0
        clock = lambda: self.now  # noqa: E731
        tier = Tier("memory", MemoryCache(64 * 1024, clock=clock), clock=clock)
        sketch = FrequencySketch(64)
        self.chain = Chain([tier], frequency=sketch, max_answer_bytes=1024, clock=clock)
        self.flights = SingleFlight(max_bytes=1024, is_purged=self.chain.purges.is_purged)
        self.answers = AnswerCache(
            self.chain, self.flights, GenerationLock(self.chain, [], wait_s=0)
        )

    async def ask(self, generation: Generation, acceptance: Acceptance = ANY) -> str:
        """Return what becomes of a request, and the answer: `miss new`."""
        found = await self.answers.get_or_generate("k", lambda: generation, acceptance)
        if isinstance(found, Hit):
            return f"{found.state.name} {found.entry.answer.content.decode()}"
        if found is None:
            return "refused"
        async with found.subscriber as subscriber:
            items = [item async for item in subscriber]
        how = "collapsed" if found.collapsed else found.reason
        return f"{how} {b''.join(items).decode()}"


async def test_generates_once_and_serves_from_then_on() -> None:
    house, generation = House(), Generation()
    assert await house.ask(generation, ONLY_IF_CACHED) == "refused"
    assert await house.ask(generation) == "miss new"
    await house.flights.drain(HANGS_S)
    assert await house.ask(generation) == await house.ask(generation, ONLY_IF_CACHED) == "FRESH new"
    assert await house.ask(generation, NO_CACHE) == "request new"
    assert generation.times == 2


async def test_all_who_ask_at_once_share_one_generation() -> None:
    house, generation = House(), Generation()
    generation.go.clear()
    asked = [asyncio.create_task(house.ask(generation)) for _ in range(5)]
    await asyncio.sleep(0)
    generation.go.set()
    assert sorted(await asyncio.gather(*asked)) == ["collapsed new"] * 4 + ["miss new"]
    assert generation.times == 1


async def test_what_is_not_to_be_kept_is_generated_again() -> None:
    house, generation = House(), Generation(freshness=None)
    for _ in range(2):
        assert await house.ask(generation) == "miss new"
        await house.flights.drain(HANGS_S)
    assert not house.flights.being_stored("k")
    assert generation.times == 2


async def test_a_stale_answer_is_served_and_refreshed_once() -> None:
    house, generation = House(), Generation()
    await house.chain.store("k", OLD, Freshness(10, stale_while_revalidate_s=100))
    house.now += 20
    generation.go.clear()
    served = [await house.ask(generation) for _ in range(3)]
    assert served == ["STALE_WHILE_REVALIDATE old"] * 3
    generation.go.set()
    await house.flights.drain(HANGS_S)
    assert await house.ask(generation) == "FRESH new"
    assert generation.times == generation.refreshes == 1


async def test_nothing_is_refreshed_that_cannot_be_generated() -> None:
    house, generation = House(), Generation()
    generation.can_refresh = False
    await house.chain.store("k", OLD, Freshness(10, stale_while_revalidate_s=100))
    house.now += 20
    assert await house.ask(generation) == "STALE_WHILE_REVALIDATE old"
    await house.flights.drain(HANGS_S)
    assert generation.times == 0


async def test_a_stale_answer_may_stand_in_until_it_is_purged() -> None:
    house, generation = House(), Generation()
    generation.error = OSError("the engine is gone")
    await house.chain.store("k", OLD, Freshness(10, stale_if_error_s=100))
    house.now += 20
    pending = await house.answers.get_or_generate("k", lambda: generation)
    assert isinstance(pending, Pending)
    assert (pending.reason, pending.stale and pending.stale.entry.answer) == ("stale", OLD)
    with pytest.raises(OSError, match="the engine is gone"):
        async with pending.subscriber as subscriber:
            await anext(subscriber)
    assert pending.stale is not None
    assert not house.answers.is_purged("k", pending.stale)
    await house.chain.purge("all")
    assert house.answers.is_purged("k", pending.stale)
    limited = await house.answers.get_or_generate("k", lambda: generation, YOUNG)
    assert isinstance(limited, Pending)
    assert limited.stale is None
    await house.flights.drain(HANGS_S)


async def test_nobody_gets_an_older_answer_than_others_have_got() -> None:
    house, generation = House(), Generation()
    await house.chain.store("k", OLD, Freshness(100))
    stored, store = asyncio.Event(), house.chain.store

    async def slow_store(*args: object, **options: object) -> bool:
        await stored.wait()
        return await store(*args, **options)

    house.chain.store = slow_store  # type: ignore[method-assign]
    assert await house.ask(generation, NO_CACHE) == "request new"
    # The tier still holds the old answer.
    assert await house.ask(generation) == "collapsed new"
    stored.set()
    await house.flights.drain(HANGS_S)
    assert await house.ask(generation) == "FRESH new"
    assert generation.times == 1


async def test_another_processes_answer_is_converted_to_our_encoding() -> None:
    house, generation = House(), Generation(encoding=SSE)

    class Other(GenerationLock):
        def acquire(self, *_: object):  # type: ignore[override]
            return _Held(NEW)

    house.answers = AnswerCache(house.chain, house.flights, Other(house.chain, [], wait_s=0))
    assert await house.ask(generation) == "collapsed new"
    assert generation.times == 0


class _Held:
    """A lock whose other holder has stored an answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __aenter__(self) -> Answer:
        return self._answer

    async def __aexit__(self, *_: object) -> None:
        pass
