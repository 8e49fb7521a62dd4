import numpy as np
import pytest

from server.bench.load import Load
from server.bench.records import ClientLoad, Failure
from server.bench.results.verdict import client_limit, judge, lateness_limits_s

from .rows import make_measured, make_records

LOAD = Load(rate=100.0, duration_s=10.0)
DUE = np.arange(1000) / 100


def failed(measured, load=LOAD):
    return {check.check for check in judge(measured, load) if not check.ok}


def test_a_run_that_kept_its_times_is_valid():
    checks = judge(make_measured(make_records(DUE)), LOAD)
    assert all(check.ok for check in checks)
    assert {check.check for check in checks} == {
        "lateness_p50_s", "lateness_p99_s", "connections", "loop_lag_p50_s", "loop_lag_p99_s",
        "client_cpu", "achieved_rate", "interrupted", "failed", "requests",
    }  # fmt: skip


def test_lateness_beyond_a_tenth_of_the_fastest_outcomes_latency_is_the_clients():
    sent = DUE + np.where(np.arange(1000) < 20, 0.031, 0.0)
    of_slow = make_records(DUE, sent, sent + 1.0)
    assert failed(make_measured(of_slow)) == set()
    of_fast = make_records(DUE, sent, sent + 0.05)
    assert failed(make_measured(of_fast)) == {"lateness_p99_s"}
    mixed = make_records(
        DUE, sent, sent + np.where(np.arange(1000) % 2, 1.0, 0.28),
        outcomes=["memory", "miss"], outcome=np.arange(1000) % 2,
    )  # fmt: skip
    assert lateness_limits_s(mixed) == pytest.approx({"p50": 0.028, "p99": 0.028})
    measured = make_measured(mixed)
    assert failed(measured) == {"lateness_p99_s"}
    limit = client_limit(judge(measured, LOAD))
    assert "--processes" in limit.text
    assert "lower rate" in limit.text


def test_a_client_may_wait_for_others_now_and_then_but_not_mostly():
    for late_s, often, says in (
        (0.019, 0.4, set()), (0.0019, 1, set()), (0.021, 0.4, {"lateness_p99_s"}),
        (0.0021, 0.6, {"lateness_p50_s"}),
    ):  # fmt: skip
        late = np.where(np.arange(1000) % 10 < 10 * often, late_s, 0.0)
        records = make_records(DUE, DUE + late, DUE + late + 1e-4)
        assert failed(make_measured(records)) == says
        client = ClientLoad(0, 1.0, 10.0, late)
        measured = make_measured(make_records(DUE, DUE, DUE + 1e-4), clients=[client])
        assert failed(measured) == {name.replace("lateness", "loop_lag") for name in says}


def test_more_processes_help_only_a_client_that_is_busy():
    late = make_records(DUE, DUE + 0.02)
    for cpu_s, says in ((8.0, "use more --processes"), (1.0, "leave it one")):
        client = ClientLoad(0, cpu_s, 10.0, np.zeros(9))
        limit = client_limit(judge(make_measured(late, clients=[client]), LOAD))
        assert says in limit.text


def test_waiting_for_a_connection_is_apart_from_lateness():
    """One connection, each request of 20 ms, one due each 10 ms."""
    sent = np.arange(1000) * 0.02
    measured = make_measured(make_records(DUE, sent, sent + 0.02))
    load = Load(rate=100.0, duration_s=10.0, connections=1)
    assert failed(measured, load) == {"connections", "achieved_rate"}
    assert client_limit(judge(measured, load)) is None
    assert "lateness_p99_s" in failed(measured, LOAD)


def test_processes_have_connections_of_their_own():
    sent = DUE.copy()
    records = make_records(DUE, sent, sent + 0.015, process=np.arange(1000) % 2)
    assert failed(make_measured(records), Load(rate=100.0, connections=1)) == set()


@pytest.mark.parametrize(
    ("client", "check"),
    [
        (ClientLoad(1, 9.5, 10.0, np.zeros(9)), "client_cpu"),
        (ClientLoad(1, 1.0, 10.0, np.array([0.0] * 9 + [0.1])), "loop_lag_p99_s"),
    ],
)
def test_the_worst_client_decides(client, check):
    clients = [ClientLoad(0, 1.0, 10.0, np.zeros(9)), client]
    measured = make_measured(make_records(DUE), clients=clients)
    assert failed(measured) == {check}
    assert client_limit(judge(measured, LOAD)).check == check


def test_too_few_sessions_begun_is_the_clients_fault():
    measured = make_measured(make_records(DUE[:900]), scheduled=1000)
    assert failed(measured) == {"achieved_rate"}
    assert client_limit(judge(measured, LOAD)).check == "achieved_rate"


def test_requests_that_no_connection_took_were_still_offered():
    records = make_records(
        DUE, DUE, np.full(1000, np.nan), failure=Failure.CONNECT, end=DUE + 0.001
    )
    assert failed(make_measured(records)) == {"failed", "requests"}


def test_a_run_of_which_most_failed_is_invalid():
    half = np.where(np.arange(1000) < 500, Failure.STATUS, Failure.NONE)
    assert failed(make_measured(make_records(DUE, failure=half))) == set()
    half[500] = Failure.STATUS
    assert failed(make_measured(make_records(DUE, failure=half))) == {"failed"}


def test_cut_requests_and_too_few_make_a_run_invalid():
    cut = np.where(np.arange(1000) < 15, Failure.INTERRUPTED, Failure.NONE)
    assert failed(make_measured(make_records(DUE, failure=cut))) == {"interrupted"}
    assert failed(make_measured(make_records(DUE[:19]), offered_s=0.2)) == {"requests"}


def test_a_closed_loop_says_that_it_is_not_corrected():
    checks = judge(make_measured(make_records(DUE)), Load(users=4))
    said = next(check for check in checks if check.check == "closed_loop")
    assert said.ok
    assert "can't be corrected" in said.text
    assert "achieved_rate" not in {check.check for check in checks}


def test_a_run_of_nothing_is_invalid_without_an_error():
    measured = make_measured(make_records([], outcomes=()), offered_s=0.0, clients=[])
    assert failed(measured) == {"requests"}
