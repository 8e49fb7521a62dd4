"""Runs a load: starts client processes, has them begin together, and gathers what they measured."""

import multiprocessing
import resource
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, cast

import numpy as np

from server.bench.clients.client import MOST_RECENT, Part, Report
from server.bench.clients.client_process import (
    READY,
    REPORT,
    STOP,
    Ended,
    Failed,
    load_records,
    work,
)
from server.bench.clients.http_client import check_target
from server.bench.clients.schedule import due_times
from server.bench.load import Load, Measured, Progress, Target
from server.bench.records import Floats, Records
from server.bench.workload import Workload
from server.config.base import ConfigError

_REPORT_S = 0.25
_START_S = 120.0
# A process that tells nothing for so long is stuck; at its end it writes its rows.
_SILENCE_S = 120.0
_END_S = 5.0
_AHEAD_S = 0.1
# A connection needs a file; there are some others.
_OTHER_FILES = 256
_NO_REPORT = Report(0, 0, 0, 0, {}, [])
_Pipe: TypeAlias = "Connection[Any, Any]"


class ClientError(Exception):
    """A client process couldn't do its part."""


def run_load(
    target: Target,
    workload: Workload,
    load: Load,
    on_progress: Callable[[Progress], None],
    probe_workload: Workload | None = None,
) -> Measured:
    """Offer a load, and return what was measured.

    The first Ctrl-C ends the run: what is under way then is interrupted, and all that was measured
    is returned. A run waits for the answers for at most `load.timeout_s` after its schedule's end.

    Args:
        target: is asked.
        workload: what is sent.
        load: when it is sent.
        on_progress: is called about four times a second.
        probe_workload: what `load.probe` side requests a second are.

    Raises:
        ConfigError: the load can't be offered, the URL can't be asked, or the system doesn't allow
            so many connections.
        ClientError: a client process failed.
        KeyboardInterrupt: at the second Ctrl-C.
    """
    check_target(target)
    _allow_files(load.connections)
    times = None if load.users is not None else due_times(load, workload)
    parts = [
        Part(
            number,
            target,
            load,
            workload,
            None if times is None else times[number :: load.processes],
            probe_workload if number == 0 else None,
        )
        for number in range(load.processes)
    ]
    planned = planned_s(load, workload, times)
    with tempfile.TemporaryDirectory(prefix="tierserve-bench-") as folder, _presses() as presses:
        clients = _Clients(parts, Path(folder))
        try:
            clients.start()
            began, began_unix = clients.begin()
            stopped_at = clients.watch(planned, presses, on_progress)
            records = Records.joined([load_records(ended) for ended in clients.ended()])
        finally:
            clients.end()
    loads = [ended.load for ended in clients.ended()]
    offered_s = max(client.wall_s for client in loads) if planned is None else planned
    if times is None and planned is not None:
        # The users may have had nothing more to ask.
        offered_s = min(planned, max(client.wall_s for client in loads))
    if stopped_at is not None:
        offered_s = min(offered_s, max(0.0, stopped_at - began))
    scheduled = _sessions(records) if times is None else np.count_nonzero(times <= offered_s)
    return Measured(
        records, loads, began, offered_s, began_unix, int(scheduled), stopped_at is not None
    )


def planned_s(load: Load, workload: Workload, times: Floats | None) -> float | None:
    """Return for how many seconds load is offered; None where only the sessions are bounded.

    A schedule that is bounded by its sessions lasts as long as their rate says, or until the last
    time of a trace.
    """
    if times is None:
        return load.duration_s
    if load.duration_s is not None and len(times) not in (load.sessions, workload.count):
        return load.duration_s
    by_rate = len(times) / load.rate if load.rate else 0.0
    return max(by_rate, float(times[-1]) if len(times) else 0.0)


class _Clients:
    """The client processes, and what they have told.

    Args:
        parts: what each does. folder: for their rows.
    """

    def __init__(self, parts: list[Part], folder: Path) -> None:
        self._parts, self._folder = parts, folder
        self._processes: list[SpawnProcess] = []
        self._pipes: list[_Pipe] = []
        self._told: list[Report | Ended | str | None] = [None] * len(parts)
        self._reports = [_NO_REPORT] * len(parts)
        self._recent: list[float] = []
        self._asked: dict[int, float] = {}
        self._began = 0.0

    def start(self) -> None:
        """Start all, and wait until they are ready.

        Raises:
            ClientError: one isn't.
        """
        context = multiprocessing.get_context("spawn")
        # They inherit that Ctrl-C is ignored, so that none ends by it while it starts.
        with _handling(signal.SIGINT, signal.SIG_IGN):
            for part in self._parts:
                pipe, theirs = context.Pipe()
                process = context.Process(
                    target=work, args=(part, theirs, self._folder), daemon=True
                )
                self._pipes.append(pipe)
                process.start()
                self._processes.append(process)
                theirs.close()
        until = time.monotonic() + _START_S
        while not all(told == READY for told in self._told):
            self._take(until - time.monotonic())
            if time.monotonic() > until:
                raise ClientError(f"a client process did not start within {_START_S:g} s")

    def begin(self) -> tuple[float, float]:
        """Have all begin at one time; returns it, by CLOCK_MONOTONIC and by the wall clock."""
        self._began = time.monotonic() + _AHEAD_S
        self._send(self._began)
        return self._began, time.time() + _AHEAD_S

    def watch(
        self, planned: float | None, presses: list[int], on_progress: Callable[[Progress], None]
    ) -> float | None:
        """Wait until all have ended; returns when Ctrl-C stopped them, or None.

        Raises:
            ClientError: one failed, ended or is stuck.
        """
        stopped_at = None
        while not all(isinstance(told, Ended) for told in self._told):
            if presses and stopped_at is None:
                stopped_at = time.monotonic()
                self._send(STOP)
            self._ask()
            report_at = time.monotonic() + _REPORT_S
            while (left := report_at - time.monotonic()) > 0 and not (presses and not stopped_at):
                self._take(left)
                if all(isinstance(told, Ended) for told in self._told):
                    break
            on_progress(self._progress(planned))
        return stopped_at

    def ended(self) -> list[Ended]:
        """Return what the processes told at their ends, in their order."""
        return [told for told in self._told if isinstance(told, Ended)]

    def end(self) -> None:
        """End what still runs."""
        for process, told in zip(self._processes, self._told, strict=False):
            if not isinstance(told, Ended):
                process.terminate()
        for process in self._processes:
            process.join(_END_S)
            if process.exitcode is None:
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()

    def _ask(self) -> None:
        """Ask for reports; a process that hasn't answered the last question is stuck.

        Raises:
            ClientError: one is.
        """
        now = time.monotonic()
        for number in range(len(self._parts)):
            if now - self._asked.setdefault(number, now) > _SILENCE_S:
                raise ClientError(f"client process {number} told nothing for {_SILENCE_S:g} s")
        waited = [number for number, at in self._asked.items() if at == now]
        self._send(REPORT, waited)

    def _send(self, message: object, numbers: Iterable[int] | None = None) -> None:
        for number in range(len(self._pipes)) if numbers is None else numbers:
            if not isinstance(self._told[number], Ended):
                # The end of a process is told by the end of its pipe.
                with suppress(OSError):
                    self._pipes[number].send(message)

    def _take(self, timeout_s: float) -> None:
        """Take what the processes tell within a time.

        Raises:
            ClientError: one failed or has ended.
        """
        open_pipes = [
            pipe
            for pipe, told in zip(self._pipes, self._told, strict=True)
            if not isinstance(told, Ended)
        ]
        for pipe in wait(open_pipes, max(0.0, timeout_s)):
            number = self._pipes.index(cast("_Pipe", pipe))
            try:
                told = self._pipes[number].recv()
            except (EOFError, OSError) as exc:
                self._processes[number].join(_SILENCE_S)
                code = self._processes[number].exitcode
                text = f"client process {number} ended with status {code}"
                raise ClientError(text) from exc
            if isinstance(told, Failed):
                raise ClientError(f"client process {number} failed: {told.text}")
            self._told[number] = told
            report = told.report if isinstance(told, Ended) else told
            if isinstance(report, Report):
                self._asked.pop(number, None)
                self._reports[number] = report
                self._recent += report.recent_s

    def _progress(self, planned: float | None) -> Progress:
        recent, self._recent = self._recent[:MOST_RECENT], []
        outcomes: Counter[str] = Counter()
        for report in self._reports:
            outcomes.update(report.outcomes)
        return Progress(
            elapsed_s=max(0.0, time.monotonic() - self._began),
            planned_s=planned,
            sent=sum(report.sent for report in self._reports),
            ended=sum(report.ended for report in self._reports),
            failed=sum(report.failed for report in self._reports),
            in_flight=sum(report.in_flight for report in self._reports),
            outcomes=dict(outcomes),
            recent_s=recent,
        )


def _allow_files(connections: int) -> None:
    """Allow client processes, which inherit it, as many open files as connections need.

    Raises:
        ConfigError: the system doesn't.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < count:
        should = f"should be at most {max(1, hard - _OTHER_FILES)}"
        raise ConfigError([f"--connections: {should}: the system allows {hard} files (ulimit -Hn)"])
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _sessions(records: Records) -> int:
    """Return how many sessions began, without those of the probe."""
    return int(np.count_nonzero((records.step == 0) & ~records.probe))


@contextmanager
def _presses() -> Iterator[list[int]]:
    """Note the first Ctrl-C or SIGTERM in a list; the second one raises KeyboardInterrupt."""
    presses: list[int] = []

    def on_press(number: int, _: FrameType | None) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(number)

    with _handling(signal.SIGINT, on_press), _handling(signal.SIGTERM, on_press):
        yield presses


@contextmanager
def _handling(
    number: signal.Signals, handler: Callable[[int, FrameType | None], None] | int
) -> Iterator[None]:
    """Handle a signal otherwise for a while; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
