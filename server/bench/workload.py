"""What is sent: numbered sessions, each one request or several that follow one another.

A workload is a pure function of its options, its seed and a session's number. So all client
processes make the same requests without telling one another, however many they are.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a session.

    Attributes:
        path: the route, such as `/v1/chat/completions`.
        body: the JSON body as it is sent.
        stream: whether the body asks for a stream.
        think_s: seconds between the end of the step before and this one; 0 for a first step.
    """

    path: str
    body: bytes
    stream: bool
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Requests that one user sends one after another.

    Attributes:
        steps: the requests; each is sent when the one before has ended and was thought over.
        at_s: when a trace began it, in seconds after the trace's first; None where a workload
            has no times of its own.
    """

    steps: tuple[Step, ...]
    at_s: float | None = None


class Workload(Protocol):
    """Sessions by number. Instances are pickled into client processes."""

    name: str
    """As it is given on the command line."""
    count: int | None
    """How many sessions there are; None if they never end."""

    def session(self, number: int) -> Session:
        """Return the session of this number, from 0; the same in every process and run."""
        ...

    def times(self, count: int) -> list[float] | None:
        """Return `at_s` of the first `count` sessions; None if the workload has no times."""
        ...

    def digest(self) -> str:
        """Return what tells equal workloads: model, options, seed and, of a file, its content.

        The tag of a run is left out, so runs of the same workload can be compared.
        """
        ...
