"""Runs of real processes against servers on this machine."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import pytest

from server.bench.clients.run import ClientError, _presses, planned_s, run_load
from server.bench.clients.schedule import due_times
from server.bench.load import Load, Progress, Target
from server.config.base import ConfigError
from tests.waiting import HANGS_S

from . import test_http_client
from .test_answers import CHAT_STREAM
from .test_http_client import answering
from .virtual_time import reply
from .workloads_of_tests import Failing, Numbered

HIT = reply(CHAT_STREAM, "Cache-Status: tierserve; hit; ttl=9; detail=memory", "Age: 3")
PROGRAM = """
import sys
from server.bench.load import Load, Target
from server.bench.clients.run import run_load
from tests.server.bench.clients.workloads_of_tests import Numbered

def show(progress):
    print(progress.in_flight, flush=True)

if __name__ == "__main__":
    load = Load(rate=20, duration_s=600, processes=2)
    measured = run_load(Target(sys.argv[1]), Numbered(), load, show)
    print(measured.interrupted, sorted(set(measured.records.failure.tolist())), flush=True)
    print("offered", measured.offered_s < 300, measured.scheduled < 8_000, flush=True)
"""


@contextmanager
def serving(answer: bytes) -> Iterator[str]:
    """Run a server in a thread that answers each request by the same bytes; with none, never."""
    begun: SimpleQueue[tuple[str, Callable[[], object]]] = SimpleQueue()

    async def serve() -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        async with test_http_client.serving(answering(answer, closes=False)) as url:
            begun.put((url, lambda: loop.call_soon_threadsafe(stopped.set)))
            await stopped.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    url, stop = begun.get(timeout=HANGS_S)
    try:
        yield url
    finally:
        stop()
        thread.join()


def test_processes_share_a_schedule() -> None:
    load = Load(rate=200, sessions=100, processes=2, seed=1, probe=20)
    progress: list[Progress] = []
    with serving(HIT) as url:
        workload = Numbered(stream=True)
        measured = run_load(Target(url), workload, load, progress.append, Numbered(stream=True))
    records = measured.records
    mine = records.where(~records.probe)
    order = np.argsort(mine.session)
    assert list(mine.session[order]) == list(range(100))
    # A clock that has run for months has fewer digits.
    due = mine.due[order] - measured.began
    np.testing.assert_allclose(due, due_times(load, workload), atol=1e-6)
    assert (mine.sent >= mine.due).all()
    assert (mine.process == mine.session % 2).all()
    assert set(records.process[records.probe]) == {0}
    assert records.probe.sum() >= 5
    assert not records.failure.any()
    assert {records.outcomes[number] for number in records.outcome} == {"memory"}
    assert set(records.age) == {3}
    assert set(records.chunks) == {3}
    assert len(records.gaps) == 2 * len(records)
    assert [client.process for client in measured.clients] == [0, 1]
    assert (measured.scheduled, measured.interrupted) == (100, False)
    assert measured.offered_s == pytest.approx(0.5, abs=0.2)
    last = progress[-1]
    assert (last.sent, last.ended, last.failed, last.in_flight) == (len(records),) * 2 + (0, 0)
    assert last.outcomes == {"memory": len(records)}


def test_users_are_dealt_to_processes() -> None:
    load = Load(users=5, sessions=40, processes=2)
    with serving(HIT) as url:
        measured = run_load(Target(url), Numbered(stream=True), load, lambda _: None)
    records = measured.records
    assert sorted(records.session) == list(range(40))
    assert (records.process == records.session % 5 % 2).all()
    assert measured.offered_s > 0


@pytest.mark.parametrize(
    ("ends", "text"),
    [(True, "client process 0 ended with status 7"), (False, "client process 0 failed: .*session")],
)
def test_a_process_that_fails(ends, text) -> None:
    load = Load(rate=10, sessions=10)
    with serving(HIT) as url, pytest.raises(ClientError, match=text):
        run_load(Target(url), Failing(ends=ends), load, lambda _: None)


def test_a_wrong_load_starts_nothing(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        run_load(Target("http://x"), Numbered(), Load(rate=0, sessions=1), lambda _: None)
    with pytest.raises(ConfigError, match="URL: should be"):
        run_load(Target("x"), Numbered(), Load(rate=1, sessions=1), lambda _: None)
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 1000))
    with pytest.raises(ConfigError, match="--connections: should be at most 744: the system"):
        run_load(Target("http://x"), Numbered(), Load(rate=1, sessions=1), lambda _: None)


def interrupted(url: str) -> tuple[int, list[str], str]:
    """Return status, output and errors of a run whose server never answers, and Ctrl-C."""
    command = [sys.executable, "-c", PROGRAM, url]
    # A terminal sends it to the whole group.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.strip() not in ("0", "1"):
                break
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=HANGS_S)
    return process.returncode, rest.splitlines(), errors


def test_ctrl_c_returns_what_there_is() -> None:
    with serving(b"") as url:
        status, lines, errors = interrupted(url)
    assert (status, errors) == (0, "")
    assert lines[-2:] == ["True [8]", "offered True True"]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ctrl_c_aborts(first: signal.Signals) -> None:
    with _presses() as presses:
        os.kill(os.getpid(), first)
        assert presses == [first]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nothing_outlives_an_abort() -> None:
    def abort(_: Progress) -> None:
        raise KeyboardInterrupt

    with serving(b"") as url, pytest.raises(KeyboardInterrupt):
        run_load(Target(url), Numbered(), Load(rate=10, duration_s=600), abort)
    assert multiprocessing.active_children() == []


def test_a_schedule_lasts_as_long_as_its_rate_says() -> None:
    def planned(load: Load, workload: Numbered) -> float | None:
        return planned_s(load, workload, None if load.users else due_times(load, workload))

    assert planned(Load(rate=10, arrivals="constant", sessions=50), Numbered()) == 5
    assert planned(Load(rate=10, duration_s=7), Numbered()) == 7
    assert planned(Load(rate=10, arrivals="constant", duration_s=7), Numbered(count=20)) == 2
    trace = Numbered(count=3, at=[0, 4, 9])
    assert planned(Load(arrivals="trace", speed=3, duration_s=7), trace) == 3
    assert planned(Load(users=3, duration_s=7), Numbered()) == 7
    assert planned(Load(users=3, sessions=7), Numbered()) is None
