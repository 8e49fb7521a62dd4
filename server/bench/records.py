"""What was measured: one row for each request, as columns of numpy arrays.

A million requests take about 160 MB. Times are seconds of CLOCK_MONOTONIC, which all processes
of a machine share; NaN stands for what did not happen.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Failure(IntEnum):
    """Why a request has no whole answer."""

    NONE = 0
    CONNECT = 1
    """No connection could be made."""
    DISCONNECTED = 2
    """The connection ended within the answer, or before it."""
    TIMEOUT = 3
    """No byte came for as long as `--timeout` allows."""
    STATUS = 4
    """The status isn't 2xx; the column `status` has it."""
    PROTOCOL = 5
    """The answer is not HTTP."""
    CONTENT = 6
    """The body isn't the JSON or the events that were asked for, or a stream lacks its end."""
    IN_ANSWER = 7
    """A stream held an error event."""
    INTERRUPTED = 8
    """The run ended before the answer did."""


@dataclass(slots=True)
class Records:
    """The rows of a run, or of one client process; rows of all columns belong together.

    Attributes:
        session: numbers of sessions. step: which request of its session, from 0.
        due: when the schedule wanted the request sent; in a closed loop, and for later steps of
            a session, when the user was ready to send it.
        sent: when the client began to send it; latencies contain the time to connect, as vLLM's do.
        first_byte: when the first byte of the head came.
        first_token: when the first event with content came; of a body, when its last byte came.
        end: when the answer was whole or had failed.
        last_token: when the last event with content came.
        status: HTTP status, 0 where none came.
        failure: `Failure`.
        outcome: index into `outcomes`.
        chunks: events with content; 1 for a body.
        prompt_tokens, completion_tokens, cached_tokens: of `usage`; -1 where it is missing.
        loaded_tokens: prompt tokens that `Cache-Status` says the prefix tier loaded; 0 if none.
        age: the header `Age` in seconds; NaN where it is missing.
        received: bytes of the answer's body.
        process: number of the client process.
        probe: whether it belongs to the side requests of `--probe`.
        longest_gap: seconds; NaN where the row has no gap.
        gaps: seconds between events with content (inter-token latencies), of all rows pooled, or
            of an even choice of them where there are very many.
        gap_row: the row of each gap.
        outcomes: names of outcomes, such as `memory`, `disk`, `miss`; `failed` for failures.
    """

    session: Integers
    step: Integers
    due: Floats
    sent: Floats
    first_byte: Floats
    first_token: Floats
    last_token: Floats
    end: Floats
    status: Integers
    failure: Integers
    outcome: Integers
    chunks: Integers
    prompt_tokens: Integers
    completion_tokens: Integers
    cached_tokens: Integers
    loaded_tokens: Integers
    age: Floats
    received: Integers
    process: Integers
    probe: NDArray[np.bool_]
    longest_gap: Floats
    gaps: Floats
    gap_row: Integers
    outcomes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.session)

    def where(self, rows: NDArray[np.bool_]) -> "Records":
        """Return the chosen rows and their gaps."""
        numbers = np.cumsum(rows) - 1
        of_gaps = rows[self.gap_row]
        chosen = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if f.name not in ("gaps", "gap_row", "outcomes")
        }
        return Records(
            **chosen,
            gaps=self.gaps[of_gaps],
            gap_row=numbers[self.gap_row[of_gaps]],
            outcomes=self.outcomes,
        )

    @classmethod
    def joined(cls, parts: Iterable["Records"]) -> "Records":
        """Return the rows of all parts, one after the other, with one list of outcomes."""
        parts = list(parts)
        outcomes = list(dict.fromkeys(name for part in parts for name in part.outcomes))
        columns: dict[str, list[np.ndarray]] = {
            f.name: [] for f in fields(cls) if f.name != "outcomes"
        }
        rows = 0
        for part in parts:
            renumbered = np.array([outcomes.index(name) for name in part.outcomes], dtype=np.int64)
            for name, found in columns.items():
                column = getattr(part, name)
                if name == "gap_row":
                    column = column + rows
                elif name == "outcome" and len(column):
                    column = renumbered[column]
                found.append(column)
            rows += len(part)
        return cls(
            **{name: np.concatenate(found) for name, found in columns.items()}, outcomes=outcomes
        )


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """What a client process tells of itself, so that a run can be judged.

    Attributes:
        process: its number.
        cpu_s: processor seconds that it used while it offered load. wall_s: how long that was.
        lags: seconds by which ticks of its event loop came late.
    """

    process: int
    cpu_s: float
    wall_s: float
    lags: Floats
