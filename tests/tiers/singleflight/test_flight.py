"""Single flight: one producer, every listener gets everything, and leaving is noticed."""

import asyncio

import pytest

from tests.tiers.conftest import JSON, SSE
from tests.waiting import HANGS_S
from tiers import Answer, Flight, Provenance, SingleFlight

ANSWER = Answer(SSE, b"")


async def read(listener) -> list[bytes]:
    async with listener:
        return [item async for item in listener]


async def test_many_listeners_share_one_generation() -> None:
    flights, started = SingleFlight(max_bytes=1000), 0

    async def produce(flight: Flight) -> None:
        nonlocal started
        started += 1
        for number in range(5):
            await asyncio.sleep(0)
            await flight.publish(b"%d" % number)
        flight.end(ANSWER)

    joined = [flights.join("k", SSE, produce) for _ in range(200)]
    results = await asyncio.gather(*(read(listener) for listener, _ in joined))
    assert started == 1
    assert results == [[b"0", b"1", b"2", b"3", b"4"]] * 200
    assert [collapsed for _, collapsed in joined] == [False] + [True] * 199
    await asyncio.sleep(0)
    assert len(flights) == 0


async def test_a_listener_takes_at_once_what_is_there() -> None:
    flights = SingleFlight(max_bytes=8)

    async def produce(flight: Flight) -> None:
        for number in range(10):
            await flight.publish(b"%d" % number)
        flight.end(ANSWER)

    listener, _ = flights.join("k", SSE, produce)
    async with asyncio.timeout(HANGS_S), listener:
        assert listener.take_ready(100) == []
        assert await anext(listener) == b"0"
        # The log holds eight, and the producer waits until some are read.
        assert listener.take_ready(3) == [b"1", b"2", b"3"]
        assert listener.take_ready(100) == [b"4", b"5", b"6", b"7"]
        assert await anext(listener) == b"8"
        assert [item async for item in listener] == [b"9"]


async def test_ends_when_the_last_listener_leaves() -> None:
    flights, cancelled = SingleFlight(max_bytes=1000), asyncio.Event()

    async def produce(flight: Flight) -> None:
        try:
            await flight.publish(b"first")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    first, _ = flights.join("k", SSE, produce)
    second, _ = flights.join("k", SSE, produce)
    async with second:
        async with first:
            assert await anext(first) == b"first"
        assert await anext(second) == b"first"
        assert not cancelled.is_set()
    await asyncio.wait_for(cancelled.wait(), HANGS_S)
    await flights.drain(HANGS_S)
    assert len(flights) == 0


async def test_a_newcomer_does_not_join_a_flight_that_is_ending() -> None:
    flights = SingleFlight(max_bytes=1000)

    async def produce(flight: Flight) -> None:
        await flight.publish(b"x")
        flight.end(ANSWER)

    async with flights.join("k", SSE, produce)[0]:
        pass
    listener, collapsed = flights.join("k", SSE, produce)
    assert not collapsed
    assert await read(listener) == [b"x"]


async def test_who_wants_a_newer_answer_joins_none_that_is_only_stored() -> None:
    flights, stored, started = SingleFlight(max_bytes=1000), asyncio.Event(), 0

    async def produce(flight: Flight) -> None:
        nonlocal started
        started += 1
        await flight.publish(b"%d" % started)
        flight.end(ANSWER)
        await stored.wait()

    async with asyncio.timeout(HANGS_S):
        assert await read(flights.join("k", SSE, produce)[0]) == [b"1"]
        again, joined = flights.join("k", SSE, produce)
        assert joined
        assert await read(again) == [b"1"]
        newer, joined = flights.join("k", SSE, produce, joins_ended=False)
        assert not joined
        # It is generated now, so another one who wants a newer answer gets the same.
        other, joined = flights.join("k", SSE, produce, joins_ended=False)
        assert joined
        assert [await read(newer), await read(other)] == [[b"2"], [b"2"]]
        stored.set()
        await flights.drain(HANGS_S)


async def test_an_error_reaches_every_listener() -> None:
    flights = SingleFlight(max_bytes=1000)

    async def produce(flight: Flight) -> None:
        await flight.publish(b"x")
        raise OSError("engine died")

    listeners = [flights.join("k", SSE, produce)[0] for _ in range(3)]
    results = await asyncio.gather(*(read(each) for each in listeners), return_exceptions=True)
    assert [type(result) for result in results] == [OSError] * 3


async def test_a_slow_listener_holds_the_producer_and_not_memory() -> None:
    flights, published = SingleFlight(max_bytes=10), 0

    async def produce(flight: Flight) -> None:
        nonlocal published
        for _ in range(100):
            await flight.publish(b"12345")
            published += 1
        flight.end(ANSWER)

    slow, _ = flights.join("k", SSE, produce)
    async with slow:
        for _ in range(10):
            await asyncio.sleep(0)
        assert published == 2
        assert len([item async for item in slow]) == 100


async def test_finish_cancels_what_takes_too_long() -> None:
    flights = SingleFlight(max_bytes=10)

    async def produce(flight: Flight) -> None:
        await asyncio.Event().wait()

    listener, _ = flights.join("k", SSE, produce)
    await flights.drain(0)
    with pytest.raises(ConnectionAbortedError):
        await read(listener)


async def test_nobody_joins_what_has_been_purged() -> None:
    purged: set[tuple[str, Provenance]] = set()
    flights = SingleFlight(max_bytes=10, is_purged=lambda key, origin: (key, origin) in purged)
    go = asyncio.Event()

    async def produce(flight: Flight) -> None:
        await go.wait()
        flight.end(Answer(JSON, b"{}"))

    first, second = Provenance(1, b"model:m"), Provenance(2, b"model:m")
    listeners = [flights.join("k", JSON, produce, first)[0]]
    assert flights.join("k", JSON, produce, second)[1]
    purged.add(("k", first))
    listener, collapsed = flights.join("k", JSON, produce, second)
    assert not collapsed
    assert listener.flight.provenance == second
    assert flights.join("k", JSON, produce, second)[1]
    go.set()
    for each in (*listeners, listener):
        assert [item async for item in each] == []
    await asyncio.sleep(0)
    assert len(flights) == 0


async def test_flights_are_kept_apart_and_known_by_their_key() -> None:
    async def produce(flight: Flight) -> None:
        await asyncio.Event().wait()

    purged: list[str] = []
    flights = SingleFlight(max_bytes=1024, is_purged=lambda key, _: key in purged)
    first, _ = flights.join("k", SSE, produce)
    other, joined = flights.join("k", SSE, produce, variant="x")
    assert not joined
    again, joined = flights.join("k", SSE, produce, variant="x")
    assert joined
    assert again.flight is other.flight is not first.flight
    purged.append("k")
    _, joined = flights.join("k", SSE, produce, variant="x")
    assert not joined
    await flights.drain(0)


async def test_a_flight_is_being_stored_until_its_producer_returns() -> None:
    went: dict[Flight, asyncio.Event] = {}

    async def produce(flight: Flight) -> None:
        went[flight] = asyncio.Event()
        await flight.publish(b"item")
        flight.end(Answer(SSE, b"item"))
        flights.mark_being_stored("k", flight)
        await went[flight].wait()

    purged: list[str] = []
    flights = SingleFlight(max_bytes=1024, is_purged=lambda key, _: key in purged)
    assert flights.being_stored("k") is None
    first, _ = flights.join("k", SSE, produce)
    assert flights.being_stored("k") is None
    assert await read(first) == [b"item"]
    assert flights.being_stored("k") is first.flight
    second, _ = flights.join("k", SSE, produce, variant="x")
    assert await read(second) == [b"item"]
    last = flights.being_stored("k")
    assert last is second.flight
    assert await read(last.subscribe()) == [b"item"]
    assert flights.being_stored("other") is None
    # The one that lands first is another.
    went[first.flight].set()
    assert first.flight.task is not None
    await first.flight.task
    await asyncio.sleep(0)
    assert flights.being_stored("k") is last
    purged.append("k")
    assert flights.being_stored("k") is None
    purged.clear()
    went[second.flight].set()
    await flights.drain(HANGS_S)
    assert flights.being_stored("k") is None
    assert not flights._being_stored
