"""Runs that nobody made, for tests of what shows them."""

from typing import Any

import numpy as np

from server.bench.load import Load, Measured, Target
from server.bench.records import ClientLoad, Failure, Records
from server.bench.results.figures import build_result
from server.bench.results.objective import parse
from server.bench.results.result import Settings

BEGAN = 1000.0
OPEN, CLOSED = Load(rate=33.3, duration_s=60.0), Load(users=4, duration_s=60.0)


def measured(rows: Records | None = None, *, interrupted: bool = False) -> Measured:
    rows = records() if rows is None else rows
    clients = [ClientLoad(0, 6.0, 60.0, np.full(100, 0.0002))]
    return Measured(rows, clients, BEGAN, 60.0, 1.8e9, len(rows), interrupted)


def result(of: Measured | None = None, load: Load = OPEN, **settings: Any) -> dict[str, Any]:
    """Return the result of a run; without a run, of one with all kinds of outcomes."""
    fields = {
        "workload": "search", "digest": "d", "seed": 0, "cache": "cold", "load": load,
        "target": Target("http://host"), "model": "m", "path": "/v1/chat/completions",
        "objective": parse("ttft=200ms@90%"), **settings,
    }  # fmt: skip
    return build_result(of or measured(), Settings(**fields))


def records(count: int = 2000, *, span_s: float = 60.0, seed: int = 1) -> Records:
    """Return hits of two tiers, misses, failures and requests of a probe, at an even rate."""
    random = np.random.default_rng(seed)
    outcomes = ["memory", "disk", "miss", "failed"]
    outcome = random.choice(4, count, p=[0.6, 0.2, 0.18, 0.02])
    due = np.linspace(0, span_s, count, endpoint=False) + BEGAN
    sent = due + random.exponential(0.0005, count)
    scale = np.array([0.001, 0.002, 0.2, 0.5])[outcome]
    first = sent + scale * random.lognormal(0, 0.3, count)
    took = np.where(outcome == 2, random.lognormal(0.6, 0.3, count), 0.0003)
    end = first + took
    failed = outcome == 3
    chunks = np.where(outcome == 2, 20, 2)
    gap_row = np.repeat(np.arange(count), chunks - 1)
    gaps = np.repeat(took / (chunks - 1), chunks - 1)
    nan = np.full(count, np.nan)
    return Records(
        session=np.arange(count),
        step=np.zeros(count, dtype=np.int64),
        due=due,
        sent=sent,
        first_byte=np.where(failed, np.nan, first),
        first_token=np.where(failed, np.nan, first),
        last_token=np.where(failed, np.nan, end),
        end=end,
        status=np.where(failed, 500, 200),
        failure=np.where(failed, Failure.STATUS, Failure.NONE),
        outcome=outcome,
        chunks=np.where(failed, 0, chunks),
        prompt_tokens=np.full(count, 40),
        completion_tokens=np.where(failed, -1, 64),
        cached_tokens=np.where(outcome == 2, 16, 0),
        loaded_tokens=np.zeros(count, dtype=np.int64),
        age=nan,
        received=np.full(count, 2000),
        process=np.zeros(count, dtype=np.int64),
        probe=np.arange(count) % 50 == 49,
        longest_gap=took / (chunks - 1),
        gaps=gaps,
        gap_row=gap_row,
        outcomes=outcomes,
    )
