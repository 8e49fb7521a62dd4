"""What a client process has to send, and when: its schedule, later steps, users, the probe."""

from array import array
from collections import deque
from heapq import heappop, heappush
from itertools import count
from math import inf

from server.bench.clients.http_client import HttpClient
from server.bench.clients.schedule import thinking_s
from server.bench.load import Load
from server.bench.records import Floats
from server.bench.workload import Session, Workload

# A closed loop's users would otherwise ask a server that refuses thousands of times a second.
_AFTER_FAILURE_S = 0.1


class Lane:
    """Requests of one workload, over connections of their own; those that wait for one."""

    def __init__(self, workload: Workload, http: HttpClient, *, is_probe: bool = False) -> None:
        self.workload, self.http, self.is_probe = workload, http, is_probe
        self.waiting: deque[Turn] = deque()


class Turn:
    """A request that is due, or will be.

    Attributes:
        lane, number, step: which one.
        due: when. user: whose, in a closed loop; -1 in an open one.
        session: its session, where that is made.
    """

    __slots__ = ("due", "lane", "number", "session", "step", "user")

    def __init__(self, lane: Lane, number: int, due: float, user: int = -1) -> None:
        self.lane, self.number, self.due, self.user = lane, number, due, user
        self.step = 0
        self.session: Session | None = None


class Agenda:
    """Turns by the time at which they are due.

    Args:
        load: the load. process: the number of the client process, which has one of
            `load.processes` sessions or users.
        began: when the load began, a time of the clock.
        times: when the process's sessions begin in an open loop, in seconds after that; None in a
            closed loop.
        main: the lane of the sessions. probe: that of side requests, if there are some.
    """

    def __init__(
        self,
        load: Load,
        process: int,
        began: float,
        times: Floats | None,
        main: Lane,
        probe: Lane | None,
    ) -> None:
        self._load, self._process, self._began, self._main = load, process, began, main
        self._times = None if times is None else array("d", times.tobytes())
        self._next = 0
        """Which of the times is next; then that time, and its session once it is made."""
        self._next_time = self._time_of(0)
        self._made: Session | None = None
        self._later: list[tuple[float, int, Turn]] = []
        self._serial = count()
        self.until = self._offers_until()
        """When no session begins any more; infinite if that isn't known."""
        self._open = 0
        if probe is not None:
            self._push(Turn(probe, 0, began))
        if times is None:
            for user in range(process, load.users or 0, load.processes):
                self._add_session(Turn(main, user, began, user))

    @property
    def is_done(self) -> bool:
        """Whether there is no turn, nor will be one, but for the probe's that aren't due."""
        return self._open == 0 and self._next_time == inf

    def next_due(self) -> float:
        """Return when the next turn is due."""
        return min(self._later[0][0] if self._later else inf, self._next_time)

    def take(self) -> Turn:
        """Take the next turn; it is open until `close`."""
        if self._later and self._later[0][0] <= self._next_time:
            turn = heappop(self._later)[2]
            if turn.lane.is_probe:
                self._open += 1
                due = self._began + (turn.number + 1) / self._load.probe
                if due < self.until:
                    self._push(Turn(turn.lane, turn.number + 1, due))
            return turn
        turn = Turn(self._main, self._next_number(), self._next_time)
        turn.session, self._made = self._made, None
        self._next += 1
        self._next_time = self._time_of(self._next)
        self._open += 1
        return turn

    def make_ahead(self) -> None:
        """Make the schedule's next session before it is due."""
        if self._made is None and self._next_time < inf:
            self._made = self._main.workload.session(self._next_number())

    def close(self, turn: Turn, *, has_failed: bool, now: float) -> None:
        """Note a turn's end; what its session or its user does next is due later, or now."""
        self._open -= 1
        steps = turn.session.steps if turn.session is not None else ()
        if not has_failed and turn.step + 1 < len(steps):
            turn.step += 1
            turn.due = now + steps[turn.step].think_s
            self._push(turn)
        elif turn.user >= 0 and self._load.users is not None:
            number = turn.number + self._load.users
            pause_s = _AFTER_FAILURE_S if has_failed else 0.0
            due = now + max(thinking_s(self._load, number), pause_s)
            self._add_session(Turn(self._main, number, due, turn.user))

    def _add_session(self, turn: Turn) -> None:
        """Have a user of a closed loop begin a session, unless there are no more."""
        bounds = self._load.sessions, self._main.workload.count
        if all(most is None or turn.number < most for most in bounds) and turn.due < self.until:
            self._push(turn)

    def _push(self, turn: Turn) -> None:
        # The probe's next turn doesn't keep a run going.
        self._open += not turn.lane.is_probe
        heappush(self._later, (turn.due, next(self._serial), turn))

    def _time_of(self, number: int) -> float:
        """Return when a session of the schedule begins; never, if there isn't such a one."""
        if self._times is None or number >= len(self._times):
            return inf
        return self._began + self._times[number]

    def _next_number(self) -> int:
        return self._process + self._next * self._load.processes

    def _offers_until(self) -> float:
        if self._load.duration_s is not None:
            return self._began + self._load.duration_s
        if self._times is None:
            return inf
        return self._began + (self._times[-1] if self._times else 0.0)
