"""Rows become columns; too many gaps are thinned out evenly."""

import numpy as np

from server.bench.clients.rows import Rows


def add(rows: Rows, number: int, gaps: list[float]) -> None:
    floats = [number + part / 10 for part in range(7)]
    rows.add(floats, [number, 0, 200, 0, 1, 1 + len(gaps), 5, 6, 7, 8, 9, number % 2], gaps)


def test_columns() -> None:
    rows = Rows()
    for number in range(5):
        add(rows, number, [number / 2] * number)
    found = rows.records(3, ["failed", "memory"])
    assert len(found) == 5
    assert list(found.session) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found.end, np.arange(5) + 0.5)
    np.testing.assert_allclose(found.age, np.arange(5) + 0.6)
    assert list(found.probe) == [False, True, False, True, False]
    assert set(found.process) == {3}
    np.testing.assert_array_equal(found.longest_gap, [np.nan, 0.5, 1, 1.5, 2])
    assert list(found.gap_row) == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    np.testing.assert_allclose(found.gaps, found.gap_row / 2)


def test_no_rows() -> None:
    found = Rows().records(0, ["failed"])
    assert (len(found), len(found.gaps), len(found.gap_row)) == (0, 0, 0)


def test_gaps_are_thinned_by_rows() -> None:
    rows = Rows(most_gaps=100)
    for number in range(1000):
        add(rows, number, [float(number)] * 3)
    found = rows.records(0, ["failed", "memory"])
    assert 40 < len(found.gaps) <= 100
    kept = np.unique(found.gap_row)
    assert set(np.diff(kept)) == {32}
    np.testing.assert_array_equal(found.gaps, found.gap_row)
    np.testing.assert_array_equal(found.longest_gap, np.arange(1000))
    assert set(found.chunks) == {4}
