import numpy as np
import pytest

from server.bench.records import Failure
from server.bench.results.series import MAX_ROWS, over_time

from .rows import make_records


def test_rates_are_of_ends_and_latencies_of_when_requests_were_due():
    records = make_records(
        due=[100.0, 100.5, 101.0, 102.9], first_token=[100.1, 102.2, 102.3, 103.0],
        outcomes=["memory", "miss", "failed"], outcome=[0, 1, 1, 2],
        failure=[0, 0, 0, Failure.STATUS],
    )  # fmt: skip
    rows = over_time(records, began=100.0, elapsed_s=3.0, open_loop=True)
    assert [row["at_s"] for row in rows] == [0.0, 1.0, 2.0]
    assert [row["requests_per_s"]["memory"] for row in rows] == [1, 0, 0]
    assert [row["requests_per_s"]["miss"] for row in rows] == [0, 0, 2]
    assert [row["errors_per_s"] for row in rows] == [0, 0, 1]
    assert [row["in_flight"] for row in rows] == [1, 2, 0]
    assert rows[0]["ttft_due_s"]["p50"] == pytest.approx((0.1 + 1.7) / 2)
    assert rows[1]["e2e_s"]["p99"] == pytest.approx(1.3)
    assert rows[2]["ttft_s"] is None


def test_a_long_run_has_600_rows():
    due = np.linspace(0, 10_000, 5_000)
    rows = over_time(make_records(due), began=0.0, elapsed_s=10_000.01, open_loop=False)
    assert len(rows) <= MAX_ROWS
    total = sum(row["requests_per_s"]["miss"] * row["width_s"] for row in rows)
    assert total == pytest.approx(5_000)
    assert rows[0]["ttft_due_s"] is None


def test_a_run_without_requests_has_no_rows():
    assert over_time(make_records([], outcomes=()), 0.0, 5.0, open_loop=True) == []
