"""One client's load, in virtual time."""

import asyncio

import numpy as np
import pytest

from server.bench.load import Load
from server.bench.records import Failure

from .virtual_time import measure
from .workloads_of_tests import Failing, Numbered

_SERVICE_S = 0.001


def at_once(now: float) -> float:
    return now + _SERVICE_S


def stalled(now: float) -> float:
    """A server that stops for the last 2 s of each 10 s."""
    into = now % 10
    return (now + 10 - into if into >= 8 else now) + _SERVICE_S


def test_what_users_feel_of_a_stall_and_what_a_tester_says_that_waits() -> None:
    load = Load(rate=100, arrivals="constant", duration_s=40, connections=4)
    records, _ = measure(Numbered(), load, stalled)
    assert len(records) == 4_000
    assert not records.failure.any()
    # A fifth of the users come in a stall and wait for (0, 2] s, so 1% for more than 1.9 s.
    assert np.percentile(records.end - records.due, 99) == pytest.approx(1.9, rel=0.02)
    assert np.percentile(records.first_token - records.due, 99) == pytest.approx(1.9, rel=0.02)
    # Four of 1,000 requests are under way when a stall begins: the 99th percentile is blind.
    assert np.percentile(records.end - records.sent, 99) == pytest.approx(_SERVICE_S)


def test_enough_connections_feel_the_stall_too() -> None:
    load = Load(rate=100, arrivals="constant", duration_s=40)
    records, _ = measure(Numbered(), load, stalled)
    assert np.percentile(records.end - records.sent, 99) == pytest.approx(1.9, rel=0.02)
    np.testing.assert_allclose(records.sent, records.due, atol=1e-6)


def test_a_closed_loop_does_not_see_it() -> None:
    records, _ = measure(Numbered(), Load(users=1, duration_s=11), stalled)
    assert (records.end - records.due).max() > 1.9
    assert np.percentile(records.end - records.due, 99) == pytest.approx(_SERVICE_S)


def test_slow_answers_delay_no_request() -> None:
    load = Load(rate=50, duration_s=20, seed=3)
    records, _ = measure(Numbered(), load, lambda now: now + 7)
    np.testing.assert_allclose(records.sent, records.due, atol=1e-6)
    np.testing.assert_allclose(records.end - records.due, 7, atol=1e-6)


def test_the_time_to_connect_is_the_servers_and_no_lateness_of_the_client() -> None:
    load = Load(rate=1, arrivals="constant", sessions=3)
    records, _ = measure(Numbered(), load, at_once, connect_s=0.3)
    np.testing.assert_allclose(records.sent, records.due, atol=1e-6)
    kept_s = _SERVICE_S
    np.testing.assert_allclose(records.end - records.sent, [0.3 + kept_s, kept_s, kept_s])


@pytest.mark.parametrize("closed", [False, True])
def test_processes_send_together_what_one_sends(closed) -> None:
    def offered(processes: int) -> list[tuple[int, float]]:
        load = {"users": 8, "sessions": 100} if closed else {"rate": 20, "duration_s": 10}
        parts = [
            measure(Numbered(), Load(**load, seed=5, processes=processes), at_once, process=each)[0]
            for each in range(processes)
        ]
        rows = [row for part in parts for row in zip(part.session, part.due.round(6), strict=True)]
        return sorted(rows)

    assert offered(1) == offered(4)


def test_steps_follow_one_another_and_are_thought_over() -> None:
    load = Load(rate=1, arrivals="constant", sessions=5)
    records, _ = measure(Numbered(thinks=(3, 0.5)), load, at_once)
    for session in range(5):
        rows = records.where(records.session == session)
        assert list(rows.step) == [0, 1, 2]
        expected = session + np.array([0, 3 + _SERVICE_S, 3.5 + 2 * _SERVICE_S])
        np.testing.assert_allclose(rows.due, expected, atol=1e-6)


def test_a_failed_step_ends_its_session() -> None:
    load = Load(rate=1, arrivals="constant", sessions=5, timeout_s=1)
    records, _ = measure(Numbered(thinks=(0,)), load, lambda now: now + (9 if now < 2.5 else 0.1))
    assert list(records.step[records.session == 0]) == [0]
    assert list(records.failure[records.session == 0]) == [Failure.TIMEOUT]
    assert list(records.step[records.session == 4]) == [0, 1]


def test_users_think_between_sessions() -> None:
    load = Load(users=10, duration_s=500, think_s=2)
    records, _ = measure(Numbered(), load, at_once)
    assert sorted(records.session[records.session % 10 == 3])[:3] == [3, 13, 23]
    # 10 users that each ask once in 2.001 s on average, 2,500 times in all.
    assert len(records) == pytest.approx(10 * 500 / 2.001, rel=0.06)


def test_users_end_with_the_workload() -> None:
    records, _ = measure(Numbered(count=7), Load(users=3, duration_s=100), at_once)
    assert sorted(records.session) == list(range(7))


def test_a_run_waits_for_answers_and_not_for_ever() -> None:
    load = Load(rate=10, arrivals="constant", duration_s=10, timeout_s=30, connections=60)
    records, _ = measure(Numbered(), load, lambda now: now + 29)
    assert len(records) == 100
    ended = records.failure == Failure.NONE
    assert ended.sum() == 60
    assert set(records.failure[~ended]) == {Failure.INTERRUPTED}
    assert {records.outcomes[number] for number in records.outcome[~ended]} == {"failed"}


def test_the_probe_asks_beside_the_load() -> None:
    load = Load(rate=10, arrivals="constant", duration_s=10, connections=1, probe=2)
    records, _ = measure(Numbered(), load, lambda now: now + 0.5, probe=Numbered(count=None))
    probes = records.where(records.probe)
    np.testing.assert_allclose(probes.due, np.arange(20) / 2, atol=1e-6)
    # It doesn't wait for the load's connection.
    np.testing.assert_allclose(probes.end - probes.due, 0.5, atol=1e-6)
    assert (~records.probe).sum() == 100


def test_a_workload_that_fails_ends_the_run() -> None:
    with pytest.raises(ValueError, match="no session 2"):
        measure(Failing(ends=False), Load(rate=10, sessions=5), at_once)


def test_a_stall_of_the_client_delays_as_many_ticks_as_it_is_long() -> None:
    class Stalling(Numbered):
        def session(self, number):
            asyncio.get_running_loop().now += 0.2 * (number == 3)
            return super().session(number)

    _, told = measure(Stalling(), Load(rate=10, arrivals="constant", duration_s=2), at_once)
    assert (told.lags > 0.01).sum() == pytest.approx(9.5, abs=1)
    assert told.lags.max() == pytest.approx(0.19, abs=0.011)


def test_what_a_client_tells_of_itself() -> None:
    load = Load(rate=10, arrivals="constant", duration_s=10)
    records, told = measure(Numbered(), load, at_once)
    assert told.wall_s == pytest.approx(10, abs=0.2)
    assert len(told.lags) == pytest.approx(500, abs=10)
    assert told.lags.max() < 1e-6
    assert (records.prompt_tokens[0], records.completion_tokens[0]) == (3, 2)
