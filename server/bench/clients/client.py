"""One client process's load: begins what is due, however long answers take, and notes each end.

Everything is a callback of the event loop. A request is due once, is sent when it is due and a
connection is free, ends once, and makes one row.
"""

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from server.bench.clients.agenda import Agenda, Lane, Turn
from server.bench.clients.alarm import Alarm
from server.bench.clients.answers import Reader, reader
from server.bench.clients.http_client import Connect, HttpClient
from server.bench.clients.http_connection import Exchange, Headers
from server.bench.clients.outcomes import FAILED, UNCACHED, Outcomes, reads_headers
from server.bench.clients.rows import Rows
from server.bench.load import Load, Target
from server.bench.records import ClientLoad, Failure, Floats, Records
from server.bench.workload import Step, Workload

_TICK_S = 0.02
# Writes go out, and answers come in, between two batches.
_BATCH = 32
MOST_RECENT = 1000
"""Response times in a report, over all processes."""
_PROBE_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Part:
    """What one client process does.

    Attributes:
        process: its number, of `load.processes`: of as many sessions or users, it has one.
        times: when its sessions begin in an open loop, in seconds after the start; None in a
            closed one.
        probe_workload: what `load.probe` side requests a second are; None if there are none.
    """

    process: int
    target: Target
    load: Load
    workload: Workload
    times: Floats | None
    probe_workload: Workload | None = None


class Report(NamedTuple):
    """How far a client is; see `Progress`."""

    sent: int
    ended: int
    failed: int
    in_flight: int
    outcomes: dict[str, int]
    recent_s: list[float]


class Timer(Protocol):
    """Calls back at a time of the client's clock."""

    def set(self, at: float) -> None:
        """Ring once at a time; never if it is infinite."""
        ...

    def close(self) -> None:
        """Never ring again."""
        ...


class _Request(Exchange):
    """A request that is sent."""

    __slots__ = (
        "_client", "age", "loaded_tokens", "outcome", "reader", "received", "status", "turn",
    )  # fmt: skip

    def __init__(self, client: "Client", turn: Turn, step: Step) -> None:
        super().__init__(step.path, step.body)
        self._client, self.turn = client, turn
        self.status = self.loaded_tokens = self.received = 0
        self.outcome, self.age = UNCACHED, nan
        self.reader: Reader = reader(step.path, stream=step.stream)

    def on_head(self, status: int, headers: Headers) -> None:
        self.status = status
        self.outcome, self.loaded_tokens, self.age = self._client.read_headers(headers)

    def on_body(self, data: bytes, now: float) -> None:
        self.received += len(data)
        if 200 <= self.status < 300:
            self.reader.feed(data, now)

    def on_end(self, failure: Failure, now: float) -> None:
        if failure is Failure.NONE:
            is_good = 200 <= self.status < 300
            failure = self.reader.end() if is_good else Failure.STATUS
        self._client.on_end(self, failure, now)


class Client:
    """Offers one process's part of the load, once.

    Args:
        part: what it does.
        clock: CLOCK_MONOTONIC. timer: makes a timer that calls back. connect: makes connections.
            Tests give others.
    """

    def __init__(
        self,
        part: Part,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[Callable[[], None]], Timer] = Alarm,
        connect: Connect | None = None,
    ) -> None:
        self._part, self._load, self._clock = part, part.load, clock
        self._loop = asyncio.get_running_loop()
        self._timer = timer(self._on_timer)
        self._connect = connect
        self.read_headers = reads_headers(part.target.outcome_header)
        self._lanes = [Lane(part.workload, self._http(part.load.connections))]
        if part.probe_workload is not None and part.load.probe > 0:
            http = self._http(_PROBE_CONNECTIONS)
            self._lanes.append(Lane(part.probe_workload, http, is_probe=True))
        self._rows, self._outcomes = Rows(), Outcomes()
        self._in_flight = self._sent = self._ended = self._failed = 0
        self._by_outcome: Counter[str] = Counter()
        self._recent: list[float] = []
        self._lags = array("d")
        self._load_of: ClientLoad | None = None
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._is_closing = False
        self._wakes_at = inf
        """When the timer rings; in the past, if a batch goes on in the loop's next round."""

    def _http(self, connections: int) -> HttpClient:
        part = self._part
        return HttpClient(part.target, connections, part.load.timeout_s, self._clock, self._connect)

    async def run(self, began: float) -> tuple[Records, ClientLoad]:
        """Offer the load from a time on, and return what came of it.

        When all is offered, it waits for the answers, but not for longer than `timeout_s`.

        Raises:
            Exception: the workload can't make a session.
        """
        self._loop.set_exception_handler(self._on_error)
        self._began, self._cpu_began = began, time.process_time()
        times = self._part.times
        lanes = self._lanes[0], self._lanes[1] if len(self._lanes) > 1 else None
        self._agenda = Agenda(self._load, self._part.process, began, times, *lanes)
        ticks = self._loop.create_task(self._tick())
        try:
            self._send_due()
            await self._finished
        finally:
            ticks.cancel()
            self._close()
        records = self._rows.records(self._part.process, self._outcomes.names)
        return records, self._load_of or self._measure()

    def stop(self) -> None:
        """End the run now; what has no answer is interrupted."""
        if not self._finished.done():
            self._finished.set_result(None)

    def report(self) -> Report:
        """Return how far the run is, and begin a new list of recent response times."""
        recent, self._recent = self._recent, []
        in_flight = self._in_flight + sum(len(lane.waiting) for lane in self._lanes)
        outcomes = dict(self._by_outcome)
        return Report(self._sent, self._ended, self._failed, in_flight, outcomes, recent)

    def _on_timer(self) -> None:
        # It may ring a nanosecond early, and then has to be set again.
        self._wakes_at = inf
        self._send_due()

    def _send_due(self) -> None:
        """Send what is due, in batches, and wake when the next turn is."""
        if self._is_closing:
            return
        for _ in range(_BATCH):
            if (due := self._agenda.next_due()) > self._clock():
                self._agenda.make_ahead()
                if due != self._wakes_at:
                    self._timer.set(due)
                    self._wakes_at = due
                if self._agenda.is_done:
                    self.stop()
                return
            self._send(self._agenda.take())
        self._loop.call_soon(self._send_due)
        self._wakes_at = -inf

    def _send(self, turn: Turn) -> None:
        """Send a request, or have it wait for a connection."""
        lane = turn.lane
        if lane.http.has_room and not lane.waiting:
            self._start(turn)
        else:
            # The bodies of thousands that wait would fill the memory.
            turn.session = None
            lane.waiting.append(turn)

    def _start(self, turn: Turn) -> None:
        if turn.session is None:
            turn.session = turn.lane.workload.session(turn.number)
        self._in_flight += 1
        self._sent += 1
        turn.lane.http.start(_Request(self, turn, turn.session.steps[turn.step]))

    def on_end(self, request: _Request, failure: Failure, now: float) -> None:
        """Note a request's end, and go on with what waits for it."""
        turn, read, usage = request.turn, request.reader, request.reader.usage
        has_failed = failure is not Failure.NONE
        self._in_flight -= 1
        outcome = self._note(turn, FAILED if has_failed else request.outcome, now)
        self._rows.add(
            (turn.due, request.sent, request.first_byte, read.first_token, read.last_token, now,
             request.age),
            (turn.number, turn.step, request.status, failure, outcome, read.chunks,
             usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens,
             request.loaded_tokens, request.received, turn.lane.is_probe),
            read.gaps,
        )  # fmt: skip
        if self._is_closing:
            return
        waiting = turn.lane.waiting
        while waiting and turn.lane.http.has_room:
            self._start(waiting.popleft())
        self._agenda.close(turn, has_failed=has_failed, now=now)
        due = self._agenda.next_due()
        if due < self._wakes_at:
            self._send_due()
        elif self._agenda.is_done:
            self.stop()

    def _note_unsent(self, turn: Turn, now: float) -> None:
        """Note the end of a turn that was due, and isn't sent any more."""
        outcome = self._note(turn, FAILED, now)
        self._rows.add(
            (turn.due, nan, nan, nan, nan, now, nan),
            (turn.number, turn.step, 0, Failure.INTERRUPTED, outcome, 0, -1, -1, -1, 0, 0,
             turn.lane.is_probe),
            (),
        )  # fmt: skip

    def _note(self, turn: Turn, name: str, now: float) -> int:
        """Count an end for reports; returns the number of its outcome."""
        outcome = self._outcomes.number(name)
        self._ended += 1
        self._failed += name == FAILED
        self._by_outcome[self._outcomes.names[outcome]] += 1
        most = max(1, MOST_RECENT // self._load.processes)
        if len(self._recent) < most:
            self._recent.append(now - turn.due)
        else:
            self._recent[self._ended % most] = now - turn.due
        return outcome

    async def _tick(self) -> None:
        """Measure by how much the event loop is late, and end what takes too long.

        Ticks have times of their own, so a stall delays as many as it is long.
        """
        at = self._began
        await asyncio.sleep(max(0.0, at - self._clock()))
        self._cpu_began = time.process_time()
        while True:
            at += _TICK_S
            await asyncio.sleep(max(0.0, at - self._clock()))
            now = self._clock()
            if self._load_of is None:
                self._lags.append(max(0.0, now - at))
                if now >= self._agenda.until:
                    self._load_of = self._measure()
            elif now > self._agenda.until + self._load.timeout_s:
                self.stop()

    def _measure(self) -> ClientLoad:
        return ClientLoad(
            self._part.process,
            time.process_time() - self._cpu_began,
            max(0.0, self._clock() - self._began),
            np.array(self._lags),
        )

    def _close(self) -> None:
        """End what is under way, and note what was due."""
        self._is_closing = True
        self._timer.close()
        for lane in self._lanes:
            lane.http.close()
        now = self._clock()
        for lane in self._lanes:
            for turn in lane.waiting:
                self._note_unsent(turn, now)
        while self._agenda.next_due() <= now:
            self._note_unsent(self._agenda.take(), now)

    def _on_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End the run by an error of ours; those of connections are the exchanges' affair."""
        exc = context.get("exception")
        is_ours = isinstance(exc, Exception) and not isinstance(exc, OSError)
        if is_ours and not self._finished.done():
            self._finished.set_exception(cast("Exception", exc))
