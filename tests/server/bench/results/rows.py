"""Rows of requests for tests, with everything that a test doesn't name as if all went well."""

import numpy as np

from server.bench.load import Load, Measured, Target
from server.bench.records import ClientLoad, Failure, Records
from server.bench.results.result import Settings

INTEGERS = {
    "status": 200,
    "failure": Failure.NONE,
    "outcome": 0,
    "step": 0,
    "chunks": 5,
    "prompt_tokens": 20,
    "completion_tokens": 5,
    "cached_tokens": 0,
    "loaded_tokens": 0,
    "received": 500,
    "process": 0,
}


def make_records(
    due, sent=None, first_token=None, last_token=None, *, outcomes=("miss",), gaps=(), **columns
):
    """Return records; by default sent when due, and with both tokens at once, 10 ms later."""
    due = np.asarray(due, dtype=np.float64)
    count = len(due)
    sent = due if sent is None else np.broadcast_to(np.asarray(sent, dtype=np.float64), count)
    first = sent + 0.01 if first_token is None else np.asarray(first_token, dtype=np.float64)
    last = first if last_token is None else np.asarray(last_token, dtype=np.float64)
    rows = [row for row, _ in gaps]
    filled = {
        name: np.broadcast_to(np.asarray(columns.pop(name, default)), count).astype(np.int64)
        for name, default in INTEGERS.items()
    }
    end = columns.pop("end", last)
    longest = np.full(count, np.nan)
    np.fmax.at(longest, np.array(rows, dtype=np.int64), [gap for _, gap in gaps])
    made = {
        "session": np.asarray(columns.pop("session", np.arange(count)), dtype=np.int64),
        "due": due,
        "sent": sent.copy(),
        "first_byte": first.copy(),
        "first_token": first.copy(),
        "last_token": last.copy(),
        "end": np.broadcast_to(np.asarray(end, dtype=np.float64), count).copy(),
        "age": np.full(count, np.nan),
        "probe": np.broadcast_to(np.asarray(columns.pop("probe", False)), count).copy(),
        "longest_gap": longest,
        "gaps": np.array([gap for _, gap in gaps], dtype=np.float64),
        "gap_row": np.array(rows, dtype=np.int64),
        **filled,
    }
    assert not columns, columns
    return Records(**made, outcomes=list(outcomes))


def make_measured(records, *, began=0.0, offered_s=10.0, scheduled=None, **others):
    clients = [ClientLoad(0, cpu_s=0.5 * offered_s, wall_s=offered_s, lags=np.full(100, 1e-4))]
    return Measured(
        records=records,
        clients=others.pop("clients", clients),
        began=began,
        offered_s=offered_s,
        began_unix=1.75e9,
        scheduled=len(records) if scheduled is None else scheduled,
        interrupted=others.pop("interrupted", False),
    )


def make_settings(**changes):
    given = {
        "workload": "search",
        "digest": "d1",
        "seed": 0,
        "cache": "cold",
        "load": Load(rate=10.0, duration_s=10.0),
        "target": Target("http://user:secret@127.0.0.1:8000", (("Authorization", "Bearer x"),)),
        "model": "small",
        "path": "/v1/chat/completions",
        "machine": {"processor": "a", "cores": 2},
    }
    return Settings(**given | changes)


def queue(arrivals, service_s, *, servers=1):
    """Return when a first-come, first-served queue ends each request (Lindley)."""
    free = np.zeros(servers)
    ends = []
    for at in arrivals:
        server = int(free.argmin())
        free[server] = max(at, free[server]) + service_s
        ends.append(free[server])
    return np.array(ends)
