"""A circuit breaker: open after failures in a row, until a probe succeeds."""

import asyncio

from tests.waiting import HANGS_S
from tiers.resilience.circuit_breaker import CircuitBreaker


async def test_the_breaker_waits_for_a_probe_that_succeeds() -> None:
    outcomes = [OSError("still"), TimeoutError(), None]
    closed = asyncio.Event()

    async def probe() -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    breaker = CircuitBreaker(probe, closed.set, pause_s=0)
    assert [breaker.failed() for _ in range(4)] == [False, False, True, False]
    assert breaker.is_open
    await asyncio.wait_for(closed.wait(), HANGS_S)
    assert not breaker.is_open
    assert outcomes == []
    assert not breaker.failed()
