"""Files as workloads: their times, their digests, and what repeats in them."""

from array import array
from pathlib import Path

import pytest

from server.bench.workloads.files.finite import in_time
from server.config.base import ConfigError
from tests.server.bench.workloads.asked import bodies, made


def test_sessions_are_in_the_order_of_time() -> None:
    order, at_s = in_time(array("d", [5, 3, 3, 9]))
    assert order.tolist() == [1, 2, 0, 3]
    assert at_s.tolist() == [0, 0, 2, 6]


def test_what_repeats_is_sent_once_beforehand(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n')
    workload = made(f"custom:{file}")
    repeated = [step.body for step in workload.repeated()]
    assert repeated == [workload.session(number).steps[0].body for number in (0, 1)]
    assert workload.count == 3
    assert workload.times(3) is None
    assert workload.session(0).at_s is None


def test_the_command_line_bounds_answers(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "output_tokens": 50}\n{"prompt": "b"}\n')
    asked = {
        most: [bodies(made(str(file), max_tokens=most).session(n))[0]["max_tokens"] for n in (0, 1)]
        for most in (None, 9, 90)
    }
    assert asked == {None: [50, 128], 9: [9, 9], 90: [50, 90]}


def test_an_empty_file_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl: should hold lines with prompt"):
        made(f"custom:{file}")
