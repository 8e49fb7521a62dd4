"""Single flight under any order of joins, leaves, reads, publishes, errors and ends."""

import asyncio
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.conftest import SSE
from tiers import Answer, Flight, SingleFlight

LONG = os.environ.get("TIERSERVE_LONG") == "1"
MAX_BYTES = 20
ANSWER = Answer(SSE, b"")
SIZES = st.sampled_from([1, 5, 10, 30])
STEPS = st.lists(
    st.one_of(
        st.just(("join",)),
        st.just(("join",)),
        st.just(("launch",)),
        st.tuples(st.just("publish"), SIZES),
        st.tuples(st.just("publish"), SIZES),
        st.tuples(st.just("read"), st.integers(0, 5), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.just(("end",)),
        st.just(("fail",)),
        st.just(("return",)),
    ),
    max_size=60,
)


class Producer:
    """Does what it is told to, one thing after the other, and notes what came of it."""

    def __init__(self) -> None:
        self.flight: Flight | None = None
        self.orders: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.published: list[bytes] = []
        self.ended = self.failed = self.cancelled = self.returned = False

    async def __call__(self, flight: Flight) -> None:
        self.flight = flight
        try:
            while True:
                order, size = await self.orders.get()
                if order == "publish" and not self.ended:
                    item = b"%d" % (len(self.published) % 10) * size
                    await flight.publish(item)
                    self.published.append(item)
                elif order == "end":
                    flight.end(ANSWER)
                    self.ended = True
                elif order == "fail":
                    self.failed = True
                    raise OSError("engine died")
                elif order == "return":
                    self.returned = True
                    return
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class Reader:
    """A listener, and what it got."""

    def __init__(self, producer: Producer, listener) -> None:
        self.producer, self.listener = producer, listener
        self.got: list[bytes] = []
        self.task: asyncio.Task[None] | None = None
        self.end: BaseException | None = None

    async def read(self, number: int) -> None:
        try:
            for _ in range(number):
                self.got.append(await anext(self.listener))
        except (StopAsyncIteration, OSError) as exc:
            self.end = exc

    def check(self) -> None:
        assert self.got == self.producer.published[: len(self.got)]


class Sky:
    """Flights under one key, with their producers, oldest first, and their readers."""

    def __init__(self) -> None:
        self.flights = SingleFlight(max_bytes=MAX_BYTES)
        self.producers: list[Producer] = []
        self.readers: list[Reader] = []

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def join(self) -> None:
        before = self.producers[-1] if self.producers else None
        made = Producer()
        listener, collapsed = self.flights.join("k", SSE, made)
        if collapsed:
            assert before is not None
            assert not any((before.failed, before.cancelled, before.returned))
            made = before
        else:
            self.producers.append(made)
        await listener.__aenter__()
        self.readers.append(Reader(made, listener))

    async def launch(self) -> None:
        if "k" not in self.flights:
            self.producers.append(Producer())
        self.flights.start_background("k", SSE, self.producers[-1])

    async def order(self, order: str, size: int = 0) -> None:
        if self.producers:
            self.producers[-1].orders.put_nowait((order, size))

    async def read(self, which: int, number: int) -> None:
        if self.readers:
            reader = self.readers[which % len(self.readers)]
            if reader.end is None and (reader.task is None or reader.task.done()):
                reader.task = asyncio.create_task(reader.read(number))

    async def leave(self, which: int) -> None:
        if self.readers:
            reader = self.readers.pop(which % len(self.readers))
            if reader.task is not None:
                reader.task.cancel()
                await asyncio.wait([reader.task])
            await reader.listener.__aexit__()

    def check(self) -> None:
        for reader in self.readers:
            if reader.producer.flight is not None:
                reader.check()
        for producer in self.producers:
            if (flight := producer.flight) is not None:
                assert flight._log_bytes == sum(map(len, flight._log))
                assert flight._log_bytes <= MAX_BYTES or len(flight._log) == 1
                over = producer.ended or producer.failed or producer.returned
                assert producer.cancelled is (not flight._positions and not over)
        assert len(self.flights) <= 1


@given(STEPS)
@settings(max_examples=2000 if LONG else 60)
async def test_everybody_gets_everything_and_nobody_hangs(steps) -> None:
    sky = Sky()
    for action, *of in steps:
        if action in ("publish", "end", "fail", "return"):
            await sky.order(action, *of)
        else:
            await getattr(sky, action)(*of)
        await sky.settle()
        sky.check()
    for producer in sky.producers:
        producer.orders.put_nowait(("return", 0))
    for _ in range(10):
        for which in range(len(sky.readers)):
            await sky.read(which, 10)
        await sky.settle()
    for reader in sky.readers:
        assert reader.got == reader.producer.published
        expected = StopAsyncIteration if reader.producer.ended else OSError
        assert isinstance(reader.end, expected)
    while sky.readers:
        await sky.leave(0)
    await sky.settle()
    assert len(sky.flights) == 0
    assert not sky.flights._tasks
