import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.load import Load
from server.bench.records import ClientLoad
from server.bench.results.objective import parse
from server.bench.results.ramp import Probe, Ramp, grows, judge_probe, requests_to_prove
from server.bench.results.result_schema import RampFound
from server.bench.results.statistics import wilson

from .rows import make_measured, make_records, make_settings, queue


def search(ramp, passes):
    while (rate := ramp.next_rate()) is not None:
        ramp.tell(Probe(rate, passes(rate), "as said"))
    return ramp.result()


@given(
    capacity=st.floats(0.1, 1e5),
    first=st.floats(0.1, 100),
    resolution=st.sampled_from([0.01, 0.05, 0.2]),
)
def test_a_ramp_finds_the_knee_within_its_resolution(capacity, first, resolution):
    found = search(Ramp(first, resolution), lambda rate: rate <= capacity)
    if found["rate"] is None:
        assert capacity < first / 512
        return
    assert found["rate"] <= capacity < found["fails_at"]
    assert found["fails_at"] <= found["rate"] * (1 + resolution)
    assert found["limited_by"] == "server"


@given(st.lists(st.booleans(), min_size=60, max_size=60))
def test_a_ramp_ends_whatever_probes_say(said):
    answers = iter(said)
    ramp = Ramp(1.0)
    found = search(ramp, lambda _: next(answers))
    assert len(found["probes"]) <= 40
    passed = [probe["rate"] for probe in found["probes"] if probe["passed"]]
    assert found["rate"] == max(passed, default=None)


def test_a_ramp_that_never_fails_says_so():
    found = search(Ramp(1.0), lambda _: True)
    assert found["limited_by"] is None
    assert "higher ones weren't tried" in found["text"]


def test_a_ramp_that_never_passes_says_why():
    found = search(Ramp(1.0), lambda _: False)
    assert found["rate"] is None
    assert found["text"].endswith("no rate that was tried: as said")


def test_rates_with_too_few_requests_are_doubled_and_none_is_sought_below_them():
    def asked(capacity, first):
        ramp = Ramp(first, 0.5)
        while (rate := ramp.next_rate()) is not None:
            ramp.tell(Probe(rate, 13 < rate <= capacity, f"at {rate}", too_few=rate <= 13))
        return [probe.rate for probe in ramp.probes], ramp.result()

    rates, found = asked(40, 2)
    assert rates == [2, 4, 8, 16, 32, 64, 48]
    assert found["rate"] == 32
    rates, found = asked(0, 4)
    assert rates == [4, 8, 16]
    assert found["rate"] is None
    assert found["text"].endswith("at 8 sessions/s it may: at 8")
    assert asked(0, 32)[0] == [32, 16, 8]


def test_a_slow_client_ends_a_ramp():
    ramp = Ramp(10.0)
    ramp.tell(Probe(ramp.next_rate(), True, "kept"))
    ramp.tell(Probe(ramp.next_rate(), False, "a client is too slow", client_limited=True))
    assert ramp.next_rate() is None
    found = ramp.result()
    assert (found["rate"], found["limited_by"]) == (10.0, "client")
    assert "the client is the limit at 20 sessions/s" in found["text"]
    assert found["text"].endswith("a client is too slow")


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999])
def test_so_many_requests_prove_a_share_if_none_misses(share):
    needed = requests_to_prove(share)
    assert wilson(needed, needed)[0] >= share
    assert wilson(needed - 1, needed - 1)[0] < share


def probe_of_queue(rate, *, service_s, objective, arrivals="poisson", count=4000, **others):
    """A probe of a server with one place and a queue (M/D/1 or D/D/1), in simulated time."""
    random = np.random.default_rng(int(rate * 1000))
    gaps = random.exponential(size=count) if arrivals == "poisson" else np.ones(count)
    due = np.cumsum(gaps) / rate
    records = make_records(due, due, queue(due, service_s), **others)
    offered_s = float(due[-1])
    settings = make_settings(load=Load(rate=rate, arrivals=arrivals, duration_s=offered_s))
    return judge_probe(rate, make_measured(records, offered_s=offered_s), settings, objective)


def test_the_knee_of_constant_arrivals_is_the_servers_capacity():
    ramp, objective = Ramp(10.0, 0.02), parse("e2e=1s@99%")
    while (rate := ramp.next_rate()) is not None:
        ramp.tell(probe_of_queue(rate, service_s=0.01, objective=objective, arrivals="constant"))
    # Beyond it, 1% more arrivals leave 20 of the last 2,000 in the queue, which chance explains.
    assert 97 <= ramp.result()["rate"] <= 104


def waiting_beyond(services, load):
    """P(wait > so many service times) in M/D/1, by its exponential tail.

    Its decay solves load (e^x - 1) = x (Cramér and Lundberg).
    """
    low, high = 1e-9, 20.0
    for _ in range(100):
        decay = (low + high) / 2
        low, high = (decay, high) if load * np.expm1(decay) < decay else (low, decay)
    return (1 - load) / (load * np.exp(decay) - 1) * np.exp(-decay * services)


def test_the_knee_of_poisson_arrivals_is_where_theory_has_it():
    ramp, objective = Ramp(10.0, 0.05), parse("e2e=50ms@95%")
    while (rate := ramp.next_rate()) is not None:
        ramp.tell(probe_of_queue(rate, service_s=0.01, objective=objective, count=20_000))
    knee = max(load for load in range(1, 100) if waiting_beyond(4, load / 100) <= 0.05)
    assert 0.92 * knee <= ramp.result()["rate"] <= 1.03 * knee


@pytest.mark.parametrize(("load", "expected"), [(0.5, False), (0.9, False), (1.1, True)])
def test_a_backlog_grows_where_arrivals_exceed_capacity(load, expected):
    random = np.random.default_rng(2)
    found = []
    for _ in range(40):
        due = np.cumsum(random.exponential(size=3000)) / (100 * load)
        records = make_records(due, due, queue(due, 0.01))
        found.append(grows(records, 0.0, float(due[-1])))
    assert np.mean(found) >= 0.9 if expected else np.mean(found) <= 0.05


def test_a_server_with_long_answers_has_no_growing_backlog():
    """Answers of 8 s within 20 s: the first half is for requests in flight to build up."""
    due = np.arange(0, 20, 0.02)
    assert not grows(make_records(due, due, due + 8.0), 0.0, 20.0)


def test_a_probe_says_why_it_fails():
    objective = parse("e2e=50ms@99%")

    def of(rate, **others):
        return probe_of_queue(rate, service_s=0.01, objective=objective, **others)

    kept = of(10.0)
    assert kept.passed
    assert "kept the objective" in kept.reason
    few = of(10.0, count=100)
    assert not few.passed
    assert few.too_few
    assert "381" in few.reason
    none = probe_of_queue(10.0, service_s=0.01, objective=parse("e2e=1ms@99%"), count=100)
    assert not none.too_few
    assert "0.00% of requests kept" in none.reason
    assert "--duration" in few.reason
    slow = of(90.0)
    assert not slow.passed
    assert "doesn't show that 99.0% do" in slow.reason
    backlog = probe_of_queue(150.0, service_s=0.01, objective=parse("e2e=1min"))
    assert not backlog.passed
    assert backlog.reason.endswith("so the backlog grew")
    long = probe_of_queue(10.0, service_s=50.0, objective=parse("e2e=1min"), count=50)
    assert "--duration is too short" in long.reason


def test_a_probe_of_full_connections_blames_the_server_and_a_busy_client_itself():
    due = np.arange(1000) / 100
    sent = np.arange(1000) * 0.02
    settings = make_settings(load=Load(rate=100.0, connections=1))
    measured = make_measured(make_records(due, sent, sent + 0.02))
    objective = parse("e2e=1min")
    found = judge_probe(100.0, measured, settings, objective)
    assert not found.passed
    assert not found.client_limited
    assert "held all connections" in found.reason
    busy = [ClientLoad(0, 9.9, 10.0, np.zeros(5))]
    measured = make_measured(make_records(due), clients=busy)
    found = judge_probe(100.0, measured, settings, objective)
    assert found.client_limited
    assert not found.passed


def test_a_knee_tells_up_to_where_each_outcome_keeps_the_objective():
    """Hits take 1 ms at any rate; misses are slow beyond 100 a second."""
    ramp, objective = Ramp(10.0, 0.1), parse("e2e=50ms@99%")
    while (rate := ramp.next_rate()) is not None:
        due = np.arange(2000) / rate
        is_miss = np.arange(2000) % 2
        took = np.where(is_miss, 0.01 if rate <= 100 else 0.2, 0.001)
        records = make_records(due, due, due + took, outcomes=["memory", "miss"], outcome=is_miss)
        measured = make_measured(records, offered_s=2000 / rate)
        settings = make_settings(load=Load(rate=rate))
        ramp.tell(judge_probe(rate, measured, settings, objective))
    found = ramp.result()
    RampFound.model_validate(orjson.loads(orjson.dumps(found)))
    assert found["rate"] <= 100 < found["fails_at"]
    assert found["outcomes"]["miss"]["highest_kept"] == found["rate"]
    assert found["outcomes"]["memory"]["highest_kept"] == 160
    at_knee = found["outcomes"]["memory"]["at_knee"]
    assert at_knee["requests_per_s"] == pytest.approx(found["rate"] / 2)
