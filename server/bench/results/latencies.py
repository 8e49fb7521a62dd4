"""Latencies and tokens of single requests, by the formulas of vLLM's `bench serve`.

TTFT is from sending to the first token, E2E to the last one, TPOT is (E2E - TTFT) / (n - 1), and
ITL has the gaps between tokens, of all requests pooled. `_due` counts from when the request was
due instead: what users feel if the server, or what stands before it, makes requests wait. Users of
a closed loop wait themselves, so there it would be no correction, and there is none.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.bench.clients.outcomes import HITS
from server.bench.records import Failure, Floats, Integers, Records

LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "ttft_due_s", "e2e_due_s")


class Sample(NamedTuple):
    """Seconds, and the row of the request that each belongs to."""

    values: Floats
    rows: Integers


def answered(records: Records) -> NDArray[np.bool_]:
    """Return which rows have a whole answer; only these have latencies."""
    found: NDArray[np.bool_] = records.failure == Failure.NONE
    return found


def is_hit(records: Records) -> NDArray[np.bool_]:
    """Return which rows were answered without generating tokens."""
    hits = np.array([name in HITS for name in records.outcomes], dtype=np.bool_)
    if not len(hits):
        return np.zeros(len(records), dtype=np.bool_)
    found: NDArray[np.bool_] = hits[records.outcome] & answered(records)
    return found


def first_token(records: Records) -> Floats:
    """Return when first tokens came; of an answer without any, when it ended."""
    return np.where(np.isnan(records.first_token), records.end, records.first_token)


def last_token(records: Records) -> Floats:
    """Return when last tokens came; of an answer without any, when it ended."""
    return np.where(np.isnan(records.last_token), records.end, records.last_token)


def completion_tokens(records: Records) -> Integers:
    """Return tokens of answers: of `usage`, or events where the answer has no `usage`."""
    told, has_usage = records.completion_tokens, records.prompt_tokens >= 0
    return np.where(told >= 0, told, np.where(has_usage, 0, records.chunks))


def time_per_token(records: Records) -> Floats:
    """Return TPOT; NaN where there is none: one token, or an answer in one piece."""
    tokens = completion_tokens(records)
    has = (tokens > 1) & (records.chunks > 1)
    spans = last_token(records) - first_token(records)
    return np.where(has, spans / np.maximum(tokens - 1, 1), np.nan)


def latencies(records: Records, *, open_loop: bool) -> dict[str, Sample]:
    """Return the latencies of all whole answers by name; without `_due` in a closed loop."""
    rows = np.flatnonzero(answered(records))
    first, last, pace = first_token(records), last_token(records), time_per_token(records)
    of_gaps = answered(records)[records.gap_row]
    paced = rows[np.isfinite(pace[rows])]
    found = {
        "ttft_s": Sample((first - records.sent)[rows], rows),
        "tpot_s": Sample(pace[paced], paced),
        "itl_s": Sample(records.gaps[of_gaps], records.gap_row[of_gaps]),
        "e2e_s": Sample((last - records.sent)[rows], rows),
    }
    if open_loop:
        found["ttft_due_s"] = Sample((first - records.due)[rows], rows)
        found["e2e_due_s"] = Sample((last - records.due)[rows], rows)
    return found
