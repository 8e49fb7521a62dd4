"""What load is offered and to whom; and what a run of it measured."""

from dataclasses import dataclass

from server.bench.records import ClientLoad, Records


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible endpoint.

    Attributes:
        url: scheme, host, port and a path before `/v1`, if any: `http://127.0.0.1:8000`.
        headers: sent with each request, such as `Authorization`.
        outcome_header: a header that names the outcome; None understands `Cache-Status`,
            `X-Cache` and `x-litellm-cache-key`.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    outcome_header: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are offered: by a rate (open loop) or by users (closed loop).

    Attributes:
        rate: sessions a second that begin; None in a closed loop and where a trace has times.
        users: users of a closed loop, who begin their next session when the last one has ended.
        arrivals: `constant`, `poisson`, `gamma` or `trace`.
        burstiness: shape of gamma; 1 is Poisson, less is burstier (as vLLM's `--burstiness`).
        speed: how many times as fast as in the trace its sessions begin.
        think_s: mean seconds (exponential) that a user thinks between sessions.
        duration_s: no session begins later; sessions: nor are there more. One of both is given.
        processes: client processes.
        connections: at most so many at a time in each process; requests beyond wait for one,
            which their response times count.
        timeout_s: how long a client waits for the next byte.
        seed: of arrivals and thinking.
        probe: small side requests a second, or 0.
    """

    rate: float | None = None
    users: int | None = None
    arrivals: str = "poisson"
    burstiness: float = 1.0
    speed: float = 1.0
    think_s: float = 0.0
    duration_s: float | None = None
    sessions: int | None = None
    processes: int = 1
    connections: int = 2048
    timeout_s: float = 600.0
    seed: int = 0
    probe: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, over all client processes; counts are since its start.

    Attributes:
        elapsed_s, planned_s: seconds; planned is None where only the sessions are bounded.
        sent, ended, failed: requests. in_flight: requests that have no end yet.
        outcomes: ended requests by outcome.
        recent_s: response times of those that ended since the last report, at most 1,000.
    """

    elapsed_s: float
    planned_s: float | None
    sent: int
    ended: int
    failed: int
    in_flight: int
    outcomes: dict[str, int]
    recent_s: list[float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A run's rows and what its clients tell of themselves.

    Attributes:
        began: CLOCK_MONOTONIC at which the schedule began. offered_s: seconds for which load was
            offered. began_unix: the wall clock then.
        scheduled: sessions that the schedule had for that time.
        interrupted: whether Ctrl-C ended the run.
    """

    records: Records
    clients: list[ClientLoad]
    began: float
    offered_s: float
    began_unix: float
    scheduled: int
    interrupted: bool
