"""Collects a client process's rows compactly while it runs, and makes columns of them after."""

from array import array
from collections.abc import Sequence
from math import nan

import numpy as np

from server.bench.records import Records

MOST_GAPS = 16 * 1024 * 1024
"""Gaps of all rows up to so many, 128 MB, are kept; then those of each second, fourth… row."""
_FLOATS = (
    "due", "sent", "first_byte", "first_token", "last_token", "end", "age", "longest_gap",
)  # fmt: skip
_INTEGERS = (
    "session", "step", "status", "failure", "outcome", "chunks", "prompt_tokens",
    "completion_tokens", "cached_tokens", "loaded_tokens", "received", "probe",
)  # fmt: skip


class Rows:
    """Rows in the order in which requests ended.

    Args:
        most_gaps: more are thinned out.
    """

    def __init__(self, most_gaps: int = MOST_GAPS) -> None:
        self._most_gaps = most_gaps
        self._floats, self._integers = array("d"), array("q")
        self._gaps, self._gap_counts = array("d"), array("q")
        self._keeps_each = 1

    def add(self, floats: Sequence[float], integers: Sequence[int], gaps: Sequence[float]) -> None:
        """Add a row.

        Args:
            floats: `due`, `sent`, `first_byte`, `first_token`, `last_token`, `end`, `age`.
            integers: `session`, `step`, `status`, `failure`, `outcome`, `chunks`,
                `prompt_tokens`, `completion_tokens`, `cached_tokens`, `loaded_tokens`,
                `received`, `probe`.
            gaps: seconds between events with content.
        """
        self._floats.extend(floats)
        self._floats.append(max(gaps) if gaps else nan)
        if gaps and len(self._gap_counts) % self._keeps_each:
            gaps = ()
        self._integers.extend(integers)
        self._gap_counts.append(len(gaps))
        if gaps:
            self._gaps.extend(gaps)
            if len(self._gaps) > self._most_gaps:
                self._thin()

    def _thin(self) -> None:
        """Drop the gaps of each second row that has some, so that those kept are no choice."""
        self._keeps_each *= 2
        counts, gaps = np.array(self._gap_counts), np.array(self._gaps)
        is_kept = np.arange(len(counts)) % self._keeps_each == 0
        self._gaps = array("d", gaps[np.repeat(is_kept, counts)].tobytes())
        self._gap_counts = array("q", np.where(is_kept, counts, 0).tobytes())

    def records(self, process: int, outcomes: list[str]) -> Records:
        """Return all rows as columns; `outcomes` are the names of their outcomes."""
        floats = np.array(self._floats).reshape(-1, len(_FLOATS))
        integers = np.array(self._integers).reshape(-1, len(_INTEGERS))
        rows = len(floats)
        columns = {name: floats[:, at].copy() for at, name in enumerate(_FLOATS)}
        columns |= {name: integers[:, at].copy() for at, name in enumerate(_INTEGERS)}
        columns["probe"] = columns["probe"].astype(np.bool_)
        return Records(
            **columns,
            process=np.full(rows, process),
            gaps=np.array(self._gaps),
            gap_row=np.repeat(np.arange(rows), np.array(self._gap_counts)),
            outcomes=outcomes,
        )
