"""A timer of the system."""

import asyncio
import time
from math import inf

import uvloop

from server.bench.clients.alarm import Alarm


def test_it_rings_never_early_and_once() -> None:
    async def check() -> list[float]:
        rings: list[float] = []
        rung = asyncio.Event()

        def ring() -> None:
            rings.append(time.monotonic())
            rung.set()

        alarm = Alarm(ring)
        begun = time.monotonic()
        alarm.set(begun + 3600)
        alarm.set(inf)
        for number in range(5):
            at = begun + number / 1000
            alarm.set(at)
            await rung.wait()
            rung.clear()
            assert rings[-1] >= at
        await asyncio.sleep(0.01)
        alarm.close()
        return rings

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            assert len(runner.run(check())) == 5
