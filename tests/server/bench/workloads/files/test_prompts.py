"""Files of prompts: ShareGPT's chats, vLLM's prompts, MT-bench's questions."""

import re
from pathlib import Path

import orjson
import pytest

from server.config.base import ConfigError
from tests.server.bench.workloads.asked import bodies, made


def said(*turns: str, begin: int = 0) -> dict:
    names = ("human", "gpt")
    each = [{"from": names[(begin + n) % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": "x", "conversations": each}


def write(tmp_path: Path, *chats: dict) -> Path:
    file = tmp_path / "chats.json"
    file.write_bytes(orjson.dumps([*chats]))
    return file


def texts(body: dict) -> list[tuple[str, str]]:
    return [(each["role"], each["content"]) for each in body["messages"]]


def test_a_chat_of_sharegpt_is_one_question_or_several(tmp_path: Path) -> None:
    chat = said("why?", "since " * 4, "and then?", "ok")
    file = write(tmp_path, said("only gpt", begin=1), chat, said("cut", "hi", "there", begin=1))
    one, all_ = made(f"sharegpt:{file}"), made(f"{file},turns=5,think=3")
    # Nobody asks anything in the first chat.
    assert one.count == all_.count == 2
    (body,) = bodies(one.session(0))
    assert texts(body) == [("user", "why?")]
    # The file's answer has 24 characters.
    assert body["max_tokens"] == 6
    first, second = bodies(all_.session(0))
    assert first == body
    assert texts(second) == [("user", "why?"), ("assistant", "since " * 4), ("user", "and then?")]
    assert [step.think_s > 0 for step in all_.session(0).steps] == [False, True]
    assert texts(bodies(all_.session(1))[0]) == [("user", "hi")]


def test_long_turns_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, said("a" * 64, "b", "c" * 8, "d"), said("a" * 65))
    workload = made(f"sharegpt:{file},turns=2,max_prompt_tokens=16")
    assert workload.count == 1
    assert len(workload.session(0).steps) == 1


@pytest.mark.parametrize(
    ("chat", "problem"),
    [
        ({}, "conversations should be a list, but is missing"),
        ({"conversations": ["hi"]}, "conversations should hold objects with from and value"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "from should be one of human, "),
        ({"conversations": [{"from": "human"}]}, "value should be a text"),
    ],
)
def test_a_wrong_chat_is_named(tmp_path: Path, chat: dict, problem: str) -> None:
    file = write(tmp_path, said("a"), chat)
    with pytest.raises(ConfigError, match=rf"chats\.json:2: {re.escape(problem)}"):
        made(f"sharegpt:{file}")


def test_vllms_prompts_have_their_lengths(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "why?", "output_tokens": 3}\n{"prompt": "how?"}\n')
    workload = made(str(file), max_tokens=8)
    asked = [bodies(workload.session(number))[0] for number in (0, 1)]
    assert [each["max_tokens"] for each in asked] == [3, 8]
    assert texts(asked[1]) == [("user", "how?")]
    file.write_text('{"prompt": "why?"}\n{"prompt": 3}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2: prompt should be a text, not 3"):
        made(str(file))
    file.write_text('{"prompt": "why?", "output_tokens": "many"}\n')
    with pytest.raises(ConfigError, match=r":1: output_tokens should be a whole number"):
        made(str(file))


def test_mt_bench_comes_with_the_package() -> None:
    workload = made("mtbench:turns=2,assistant=5")
    assert workload.count == 80
    first, second = bodies(workload.session(0))
    assert "Hawaii" in first["messages"][0]["content"]
    assert second["messages"][0] == first["messages"][0]
    assert len(second["messages"][1]["content"].split()) == 5
    assert second["messages"][2]["content"].startswith("Rewrite your previous response")
    assert len(made("mtbench").session(0).steps) == 1


def test_another_file_of_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n')
    assert texts(bodies(made(f"{file},turns=2").session(0))[1])[2] == ("user", "b")
    file.write_text('{"turns": []}\n')
    with pytest.raises(ConfigError, match=r":1: turns should be a list of texts"):
        made(str(file))
