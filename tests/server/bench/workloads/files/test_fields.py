"""Fields of rows, as CSV and JSON have them."""

import pytest

from server.bench.workloads.files.fields import count_of, list_of, seconds_of, text_of


def test_right_ones_are_read() -> None:
    row = {"text": "a", "count": "7", "number": 7, "time": "1.5", "at": 2, "list": [1]}
    assert text_of(row, "text") == "a"
    assert count_of(row, "count") == count_of(row, "number") == 7
    assert (seconds_of(row, "time"), seconds_of(row, "at")) == (1.5, 2.0)
    assert list_of(row, "list") == [1]


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (text_of, ["", 3, None]),
        (count_of, ["", "-1", "1_000", "1.0", "9" * 5000, -1, 10_000_001, 1.5, True, None]),
        (seconds_of, ["", "a", "-1", "nan", "inf", -1, True, None, []]),
        (list_of, ["", {}, None]),
    ],
)
def test_wrong_ones_are_named(read, values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=r"^a should be "):
            read({"a": value}, "a")
    with pytest.raises(ValueError, match=r"^a should be .*, but is missing$"):
        read({}, "a")
