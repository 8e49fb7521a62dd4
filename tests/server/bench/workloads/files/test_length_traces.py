"""Azure's and BurstGPT's traces: as many words as tokens, and no prompt twice."""

import re
from pathlib import Path

import pytest

from server.config.base import ConfigError
from tests.server.bench.workloads.asked import bodies, made, prompts

AZURE = Path("tests/data/azure_llm_code.csv")


def test_azures_requests_have_their_lengths_and_times() -> None:
    workload = made(str(AZURE))
    rows = [row.split(",") for row in AZURE.read_text().splitlines()[1:]]
    assert workload.count == len(rows) == 200
    texts = prompts(workload, range(200))
    assert [len(text.split()) for text in texts] == [max(8, int(row[1])) for row in rows]
    assert len(set(texts)) == 200
    asked = [bodies(workload.session(number))[0]["max_tokens"] for number in range(200)]
    assert asked == [int(row[2]) for row in rows]
    times = workload.times(200)
    assert times == sorted(times)
    assert times[0] == 0
    assert workload.session(9).at_s == times[9]
    scaled = made(f"azure:{AZURE},scale=0.01,max_prompt_tokens=20", max_tokens=2)
    assert {len(text.split()) for text in prompts(scaled, range(200))} <= {*range(8, 21)}
    assert {bodies(scaled.session(number))[0]["max_tokens"] for number in range(200)} <= {1, 2}


def test_burstgpts_failed_requests_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "b.csv"
    file.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "45,ChatGPT,472,18,490,Conversation log\n5,GPT-4,1087,0,1087,Conversation log\n"
        "15.5,GPT-4,417,276,693,API log\n"
    )
    workload = made(str(file))
    assert workload.kind == "burstgpt"
    assert workload.times(2) == [0, 29.5]
    assert [len(text.split()) for text in prompts(workload, range(2))] == [417, 472]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("yesterday,1,2", "TIMESTAMP should be a date, not 'yesterday'"),
        ("2023-11-16 18:15:46,many,2", "ContextTokens should be a whole number, not 'many'"),
        ("2023-11-16 18:15:46,1", "GeneratedTokens should be a whole number, not None"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, problem: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,2\n{row}\n")
    with pytest.raises(ConfigError, match=rf"^--workload: .*a\.csv:3: {re.escape(problem)}$"):
        made(f"azure:{file}")


def test_a_file_that_is_no_text_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xff\xfe\x00")
    for spec in (f"azure:{file}", str(file)):
        with pytest.raises(ConfigError, match=r"a\.csv: should be CSV"):
            made(spec)
