"""Mooncake's and Bailian's traces: prompts share what the trace's blocks say that they share."""

import re
from pathlib import Path

import orjson
import pytest

from server.config.base import ConfigError
from tests.server.bench.workloads.asked import alike, bodies, made, prompts

END = Path("tests/data/mooncake_synthetic_trace_end.jsonl")
LINES = [orjson.loads(line) for line in END.read_bytes().splitlines()]


def test_real_prompts_share_as_the_trace_says() -> None:
    workload = made(f"{END},scale=0.125")
    assert workload.count == len(LINES) == 60
    texts = [text.split() for text in prompts(workload, range(60))]
    pairs = 0
    for one, words in zip(LINES, texts, strict=True):
        assert len(words) == round(one["input_length"] / 8)
        for other, others in zip(LINES, texts, strict=True):
            blocks = alike(one["hash_ids"], other["hash_ids"])
            if one is other or not blocks:
                continue
            # The last block of a prompt is not full.
            shared = min(blocks * 64, len(words), len(others))
            assert shared <= alike(words, others) < shared + 4
            pairs += 1
    assert pairs > 100


def test_lengths_and_times_are_those_of_the_trace() -> None:
    workload = made(f"mooncake:{END}")
    first = LINES[0]["timestamp"]
    at_s = [(line["timestamp"] - first) / 1000 for line in LINES]
    assert workload.times(60) == pytest.approx(at_s)
    assert workload.session(7).at_s == workload.times(8)[7]
    asked = [bodies(workload.session(number))[0] for number in range(5)]
    assert [each["max_tokens"] for each in asked] == [line["output_length"] for line in LINES[:5]]
    tenth = bodies(made(f"{END},scale=0.1,max_prompt_tokens=100", max_tokens=20).session(0))[0]
    assert tenth["max_tokens"] == min(20, round(LINES[0]["output_length"] / 10))
    assert len(tenth["messages"][0]["content"].split()) == 100


def line(at: float, tokens: int, answer: int, *blocks: int, **more) -> bytes:
    fields = {"timestamp": at, "input_length": tokens, "output_length": answer, "hash_ids": blocks}
    return orjson.dumps(fields | more) + b"\n"


def test_equal_prompts_are_equal_requests(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(line(2000, 600, 7, 1, 2) + line(1000, 600, 5, 1, 3) + line(3000, 600, 9, 1, 2))
    workload = made(str(file))
    assert workload.times(3) == [0, 1, 2]
    one, two, three = (workload.session(number).steps[0] for number in range(3))
    assert two == three != one
    assert orjson.loads(three.body)["max_tokens"] == 7
    assert len(list(workload.repeated())) == 2


def test_bailians_blocks_have_16_tokens(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(line(0.5, 40, 7, 1, 2, 3, chat_id=1) + line(1.5, 40, 7, 1, 2, 4, chat_id=2))
    workload = made(str(file))
    assert workload.kind == "bailian"
    assert workload.times(2) == [0, 1]
    one, two = (text.split() for text in prompts(workload, range(2)))
    assert len(one) == 40
    assert alike(one, two) == 32


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"timestamp": -1}, "timestamp should be a number from 0, not -1"),
        ({"input_length": None}, "input_length should be a whole number, not None"),
        ({"output_length": 1.5}, "output_length should be a whole number, not 1.5"),
        ({"hash_ids": ["a"]}, "hash_ids should be a list of whole numbers"),
        ({"hash_ids": 3}, "hash_ids should be a list, not 3"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, fields: dict, problem: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(line(0, 1, 1, 1) + line(0, 1, 1, 1, **fields))
    with pytest.raises(ConfigError, match=rf"^--workload: .*t\.jsonl:2: {re.escape(problem)}$"):
        made(f"mooncake:{file}")


def test_blocks_stay_long_enough_to_differ() -> None:
    with pytest.raises(ConfigError, match=r"mooncake: scale should be at least 0\.015625"):
        made(f"{END},scale=0.01")
