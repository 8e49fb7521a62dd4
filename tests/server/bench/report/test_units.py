"""Values as people read them."""

import pytest

from server.bench.report.units import in_order, percentile, seconds, share, three_digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0 s"), (3.4e-7, "0.340 µs"), (0.00034, "340 µs"), (0.0015, "1.50 ms"),
        (0.0999, "99.9 ms"), (0.09999, "100 ms"), (2.041, "2.04 s"), (1234.5, "1,234 s"),
    ],
)  # fmt: skip
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_three_digits() -> None:
    texts = [three_digits(value) for value in (0, 0.123, 1, 9.996, 99.96, 1234.5)]
    assert texts == ["0", "0.123", "1.00", "10.0", "100", "1,234"]


def test_percentiles() -> None:
    spread = {"p50": 0.01, "p99": 0.02, "too_few": ["p99"]}
    assert percentile(spread, "p50") == "10.0 ms"
    assert percentile(spread, "p99") == "20.0 ms*"
    assert percentile(spread, "p90") == "-"
    assert percentile(None, "p50") == "-"


def test_shares_and_order() -> None:
    assert share(1, 8) == "12.5%"
    assert share(1, 0) == "-"
    assert in_order(["failed", "new", "miss", "shared", "memory"]) == [
        "memory", "shared", "miss", "new", "failed",
    ]  # fmt: skip
