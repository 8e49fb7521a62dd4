"""A run over time: rows of equal length for plots."""

from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bench.records import Floats, Records
from server.bench.results.latencies import answered, latencies

MAX_ROWS = 600
_SHORTEST_S = 1.0
_SHOWN = ("ttft_s", "e2e_s", "ttft_due_s", "e2e_due_s")
_PERCENTILES = {"p50": 0.5, "p99": 0.99}


def over_time(
    records: Records, began: float, elapsed_s: float, *, open_loop: bool
) -> list[dict[str, Any]]:
    """Return a row for each second, or for longer where these were more than 600.

    Rates and errors are of requests that ended in the row's time. Latencies are of those that
    were due in it: so a stall of the server shows when it began, for all whom it kept waiting.
    `in_flight` is at the row's end, of requests that were due and have no end yet.
    """
    if len(records) == 0:
        return []
    width_s = max(_SHORTEST_S, ceil(elapsed_s / MAX_ROWS))
    count = max(ceil(elapsed_s / width_s), 1)
    ended = _row_of(records.end, began, width_s, count)
    due = _row_of(records.due, began, width_s, count)
    whole = answered(records)
    rates = {
        name: np.bincount(ended[records.outcome == number], minlength=count) / width_s
        for number, name in enumerate(records.outcomes)
        if (records.outcome == number).any()
    }
    errors = np.bincount(ended[~whole], minlength=count) / width_s
    waiting = np.cumsum(np.bincount(due, minlength=count) - np.bincount(ended, minlength=count))
    samples = latencies(records, open_loop=open_loop)
    spreads = {
        name: _percentiles(sample.values, due[sample.rows], count)
        for name, sample in samples.items()
        if name in _SHOWN
    }
    return [
        {
            "at_s": at * width_s,
            "width_s": width_s,
            "requests_per_s": {name: float(rate[at]) for name, rate in rates.items()},
            "errors_per_s": float(errors[at]),
            "in_flight": int(waiting[at]),
            **{name: spreads[name][at] if name in spreads else None for name in _SHOWN},
        }
        for at in range(count)
    ]


def _row_of(times: Floats, began: float, width_s: float, count: int) -> NDArray[np.int64]:
    rows = np.floor((times - began) / width_s).astype(np.int64)
    return np.clip(rows, 0, count - 1)


def _percentiles(
    values: Floats, rows: NDArray[np.int64], count: int
) -> list[dict[str, float] | None]:
    """Return the percentiles of each row; None for a row without values."""
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], np.arange(count + 1))
    ordered = values[order]
    shares = list(_PERCENTILES.values())
    return [
        dict(zip(_PERCENTILES, np.quantile(ordered[low:high], shares).tolist(), strict=True))
        if high > low
        else None
        for low, high in pairwise(bounds)
    ]
