"""Bodies are read and written without loss; prompts are counted in `test_prompts`."""

import json
from typing import Any

import pytest

from server.protocol.bodies import read_leniently, read_object, write, write_leniently
from server.protocol.errors import BadRequestError

HUGE = 12345678901234567890123


def nested(depth: int, more: str = "") -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + more.encode() + b"}"


@pytest.mark.parametrize("read", [read_object, read_leniently])
def test_integers_beyond_64_bits_are_exact(read) -> None:
    raw = b'{"a": %d, "b": 0.1, "c": 2}' % HUGE
    sent, value = read(raw)
    assert (sent, value) == (raw, {"a": HUGE, "b": 0.1, "c": 2})
    assert read_object(write(value))[1] == value
    assert read_leniently(write_leniently(value))[1] == value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": Infinity}', {"a": float("inf")}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        ('{"a": "é"}'.encode("utf-16"), {"a": "é"}),
        (b"[1]", [1]),
        (b"{", None),
        (b"\xff", None),
    ],
)
def test_what_engines_may_take_is_read_leniently(raw: bytes, value: Any) -> None:
    sent, read = read_leniently(raw)
    assert read == value
    assert value is None or json.loads(sent) == value


def test_a_body_that_can_not_be_written_is_refused() -> None:
    for write_it in (write, write_leniently):
        with pytest.raises(BadRequestError, match="nested too deeply"):
            write_it(read_leniently(nested(1010))[1])


def test_a_deep_body_with_a_long_number_is_still_read() -> None:
    assert read_leniently(nested(1010, f',"prompt":["a"],"b":{HUGE}'))[1]["prompt"] == ["a"]
    with pytest.raises(BadRequestError, match="nested too deeply"):
        read_object(nested(1010, f',"b":{HUGE}'))
