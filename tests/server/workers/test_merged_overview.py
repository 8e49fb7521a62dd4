"""What the pages show of several workers: the same as of one that did all of it."""

import subprocess
import sys

import orjson
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.history import STEP_S, STEPS, History
from server.workers.merged_overview import (
    MergedHistories,
    MergedPrefixes,
    merge_histories,
    merge_tiers,
)
from tests.server.telemetry.test_prefixes import DAY_S, SYSTEM, TOOLS, Counting, chat, usage

WORKERS = 3
START = 1_000_000
"""A number of steps."""
notes = st.lists(
    st.tuples(
        st.integers(0, 2 * STEPS),
        st.integers(0, WORKERS - 1),
        st.sampled_from(["memory", "disk", "engine"]),
        st.sampled_from(["", "acme"]),
        st.booleans(),
    ),
    max_size=40,
)


def over_json(value):
    return orjson.loads(orjson.dumps(value))


@given(notes, st.integers(0, STEPS))
def test_the_day_of_all_is_that_of_one(given_, later: int) -> None:
    """Whenever workers die and begin anew."""
    merged = MergedHistories()
    one = {tenant: History() for tenant in ("", "acme")}
    workers: list[dict[str, History]] = [{} for _ in range(WORKERS)]
    last = 0
    for step, number, tier, tenant, dies in sorted(given_):
        at, last = (START + step) * STEP_S + 1, step
        for histories in (one, workers[number]):
            histories.setdefault(tenant, History()).add(at, tier, 3, 0.5)
        if dies:
            reports = {name: each.report(at) for name, each in workers[number].items()}
            merged.add_worker(number, over_json(reports))
            merged.forget(number)
            workers[number] = {}
    now = (START + last + later) * STEP_S + 2
    for number, histories in enumerate(workers):
        # Some were asked a step ago.
        reports = {name: each.report(now - number * STEP_S) for name, each in histories.items()}
        merged.add_worker(number, over_json(reports))
    for tenant, history in one.items():
        assert merged.report(tenant, now) == history.report(now)


def test_histories_that_end_at_different_times_are_aligned() -> None:
    early, late = History(), History()
    early.add(START * STEP_S, "disk", 1, 1)
    late.add((START + 2) * STEP_S, "memory", 2, 2)
    merged = merge_histories(
        [early.report(START * STEP_S), late.report((START + 2) * STEP_S), History().report(0)]
    )
    assert merged["ends_at"] == (START + 3) * STEP_S
    assert merged["answered"] == {"disk": [1, 0, 0], "memory": [0, 0, 1]}
    assert merged["tokens_saved"] == [1, 0, 2]
    assert merged["saved_since_start"] == {"tokens": 3, "seconds": 3.0}


def test_prefixes_of_all_are_those_of_one() -> None:
    one, workers = Counting(), [Counting() for _ in range(2)]
    merged = MergedPrefixes(lambda: one.now)
    for number in range(12):
        worker = workers[number % 2]
        for each in (one, worker):
            each.now = 1e9 + number
            # Each worker has seen some beginnings only once.
            each.ask(chat(SYSTEM, f"Question {number // 2}?", "And?"), usage(100, 40))
        if number == 7:
            merged.add_worker(1, over_json(worker.prefixes.summary()))
            merged.forget(1)
            workers[1] = Counting()
    for number, worker in enumerate(workers):
        merged.add_worker(number, over_json(worker.prefixes.summary()))
    rows = one.rows()
    assert rows[0]["requests"] == 12
    assert len(rows) == 7
    assert by_text(merged.report()["prefixes"]) == by_text(rows)
    # Summaries of yesterday and what the dead have counted are halved alike.
    one.now += DAY_S
    assert by_text(merged.report()["prefixes"]) == by_text(one.rows())
    assert merged.report()["prefixes"][0]["requests"] == 6


def by_text(rows: list[dict]) -> list:
    return sorted(rows, key=lambda row: (row["characters"], row["preview"], row["requests"]))


def test_another_process_has_the_same_numbers_of_prefixes() -> None:
    program = (
        "from tests.server.telemetry.test_prefixes import *\n"
        "counting = Counting()\n"
        "counting.ask(chat(SYSTEM, 'é?', tools=TOOLS))\n"
        "print(*(row[0] for row in counting.prefixes.summary()['counters']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    counting = Counting()
    counting.ask(chat(SYSTEM, "é?", tools=TOOLS))
    numbers = [row[0] for row in counting.prefixes.summary()["counters"]]
    assert list(map(int, ran.stdout.split())) == numbers


def test_tiers_are_told_together() -> None:
    def of(count: int, *, available: bool) -> list:
        held = {"entries": count, "bytes": count, "max_bytes": 9, "hits": count}
        return [
            {"tier": "memory", "available": True} | held,
            {"tier": "disk", "available": available, "file": {"file_bytes": 7}} | held,
            {"tier": "shared", "hits": count},
        ]

    assert merge_tiers([of(1, available=True), of(2, available=False)]) == [
        {"tier": "memory", "available": True, "entries": 3, "bytes": 3, "max_bytes": 18, "hits": 3},
        {"tier": "disk", "available": False, "file": {"file_bytes": 7},
         "entries": 2, "bytes": 2, "max_bytes": 9, "hits": 3},
        {"tier": "shared", "hits": 3},
    ]  # fmt: skip
