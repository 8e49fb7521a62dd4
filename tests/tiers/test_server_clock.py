"""Machines whose clocks differ by seconds, and the clock of the server that they share."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import RedisServer
from tests.tiers.conftest import JSON, Clock
from tiers import Answer, Chain, FrequencySketch, Freshness, Hit, Tier
from tiers.entry import SKEW_S, Entry, State
from tiers.server_clock import EVERY_S, ServerClock

ANSWER = Answer(JSON, b"{}")


class Server:
    """Tells a time some seconds after it was asked, and answers as much later."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s, self.takes_s, self.asked = now_s, 0.0, 0

    async def time_s(self) -> float:
        self.asked += 1
        self.now_s += self.takes_s
        told = self.now_s
        self.now_s += self.takes_s
        return told


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 0.05))
def test_two_machines_agree_within_a_second(one_s: float, two_s: float, takes_s: float) -> None:
    server, clocks = Server(1e9), []
    server.takes_s = takes_s
    for ahead_s in (one_s, two_s):
        made = ServerClock(server, clock=lambda ahead_s=ahead_s: server.now_s + ahead_s)
        with pytest.raises(StopIteration):
            made.observe().send(None)
        clocks.append(made.ahead_s + ahead_s)
    assert abs(clocks[0] - clocks[1]) <= SKEW_S


async def test_an_offset_stays_while_it_is_small_and_is_asked_for_again_later() -> None:
    server, now_s, passed_s = Server(100.0), 100.3, 0.0
    clock = ServerClock(server, clock=lambda: now_s, monotonic=lambda: passed_s)
    await clock.observe()
    assert (clock.ahead_s, server.asked) == (0, 1)
    now_s = 105.1
    await clock.observe()
    assert (clock.ahead_s, server.asked) == (0, 1)
    passed_s = EVERY_S
    await clock.observe()
    assert (clock.ahead_s, server.asked) == (-5, 2)


async def test_a_server_that_tells_no_time_has_ours() -> None:
    class Refuses(Server):
        async def time_s(self) -> float:
            raise PermissionError

    for backend in (object(), Refuses()):
        clock = ServerClock(backend)
        await clock.observe()
        assert clock.ahead_s == 0


@given(st.floats(1e9, 2e9), st.integers(-40, 40))
def test_an_entry_comes_back_as_it_went(stored_at: float, quarters: int) -> None:
    entry = Entry(ANSWER, stored_at, stored_at + 60)
    assert entry.later_by(quarters / 4).later_by(-quarters / 4) == entry


@pytest.mark.parametrize("ahead_s", [-5, 5])
async def test_an_answer_is_as_old_for_a_machine_whose_clock_differs(
    tmp_path, monkeypatch, ahead_s
) -> None:
    """What one has just stored the other finds, with its age, and no longer than its ttl."""
    server = RedisServer(tmp_path)
    try:
        here, there = Clock(), Clock()
        chains = []
        # The server's clock stands still as theirs do, however long all this takes.
        told = Server(time.time())
        for clock in (here, there):
            backend = server.open()
            now_s = await backend.time_s()  # type: ignore[attr-defined]
            assert told.now_s - 1 < now_s < time.time() + 1
            monkeypatch.setattr(backend, "time_s", told.time_s)
            clock.now = told.now_s
            if clock is there:
                clock.now += ahead_s
            measured = ServerClock(backend, clock=clock)
            await measured.observe()
            tier = Tier("shared", backend, shared=True, server_clock=measured, clock=clock)
            sketch = FrequencySketch(64)
            chains.append(Chain([tier], frequency=sketch, max_answer_bytes=99, clock=clock))
        one, two = chains
        assert await one.store("k", ANSWER, Freshness(3, 3600))
        assert await two.find_newer("k", there.now - 1) == ANSWER
        assert await two.find_newer("k", there.now + 1) is None
        age_s = 0.0
        for passed_s, state in ((0, State.FRESH), (2.5, State.FRESH), (1, 1)):
            age_s += passed_s
            for chain, clock in zip(chains, (here, there), strict=True):
                clock.now += passed_s
                hit = await chain.lookup("k")
                assert isinstance(hit, Hit)
                assert hit.state is State(state)
                assert abs(clock.now - hit.entry.stored_at - age_s) < 0.5
        for chain in chains:
            await chain.close()
    finally:
        server.kill()
