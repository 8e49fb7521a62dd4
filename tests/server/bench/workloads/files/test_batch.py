"""OpenAI's batch files are sent as they are, but for what the command line says."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from server.config.base import ConfigError
from tests.server.bench.workloads.asked import made


def write(tmp_path: Path, url: str, body: Any, **more: Any) -> Path:
    file = tmp_path / "batch.jsonl"
    line = {"custom_id": "1", "method": "POST", "url": url, "body": body} | more
    file.write_bytes(orjson.dumps(line) + b"\n")
    return file


def sent(file: Path, **common: Any) -> tuple[str, dict]:
    (step,) = made(str(file), **{"stream": False} | common).session(0).steps
    return step.path, orjson.loads(step.body)


def test_bodies_stay_as_they_are(tmp_path: Path) -> None:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "a"}], "top_p": 0.5}
    file = write(tmp_path, "/v1/chat/completions", body | {"temperature": 0.7, "stream": True})
    assert sent(file) == ("/v1/chat/completions", body | {"model": "m", "temperature": 0.7})
    _, streamed = sent(file, stream=True, tag="t")
    assert streamed["stream"] is True
    assert streamed["stream_options"] == {"include_usage": True}
    assert streamed["cache"] == {"tags": ["t"]}


def test_what_is_not_deterministic_is_made_so(tmp_path: Path) -> None:
    url, body = "/v1/completions", {"prompt": "a"}
    assert sent(write(tmp_path, url, body))[1]["temperature"] == 0
    assert "temperature" not in sent(write(tmp_path, url, body | {"seed": 1}))[1]
    assert "temperature" not in sent(write(tmp_path, "/v1/embeddings", {"input": "a"}))[1]


@pytest.mark.parametrize(
    ("url", "own", "bounded"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": 50}, {"max_completion_tokens": 9}),
        ("/v1/chat/completions", {"max_tokens": 5}, {"max_tokens": 5}),
        ("/v1/chat/completions", {}, {"max_tokens": 9}),
        ("/v1/responses", {}, {"max_output_tokens": 9}),
        ("/v1/messages", {"max_tokens": 50}, {"max_tokens": 9}),
        ("/v1/embeddings", {}, {}),
    ],
)
def test_answers_are_bounded(tmp_path: Path, url: str, own: dict, bounded: dict) -> None:
    file = write(tmp_path, url, {"input": "a", "messages": []} | own)
    body = sent(file, max_tokens=9)[1]
    assert {name: body[name] for name in body if "max_" in name} == bounded
    body = sent(file)[1]
    required = {"max_tokens": 128} if url == "/v1/messages" else {}
    assert {name: body[name] for name in body if "max_" in name} == required | own


@pytest.mark.parametrize(
    ("url", "body", "cold"),
    [
        ("completions", {"prompt": "a"}, {"prompt": "x a"}),
        ("completions", {"prompt": ["a", "b"]}, {"prompt": ["x a", "x b"]}),
        ("embeddings", {"input": ["a", "b"]}, {"input": ["x a", "x b"]}),
        ("responses", {"instructions": "a", "input": "b"}, {"instructions": "x a"}),
        ("responses", {"input": [{"content": "b"}]}, {"input": [{"content": "x b"}]}),
        ("messages", {"system": [{"type": "text", "text": "a"}]},
         {"system": [{"type": "text", "text": "x a"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}, {"role": "b"}]},
         {"messages": [{"role": "user", "content": "x a"}, {"role": "b"}]}),
        ("chat/completions", {"messages": [{"content": [{"type": "text", "text": "a"}]}]},
         {"messages": [{"content": [{"type": "text", "text": "x a"}]}]}),
    ],
)  # fmt: skip
def test_cold_prompts_begin_with_the_nonce(tmp_path: Path, url: str, body, cold) -> None:
    file = write(tmp_path, f"/v1/{url}", body)
    assert sent(file, nonce="x")[1] == sent(file)[1] | cold


@pytest.mark.parametrize(
    ("url", "body", "more", "problem"),
    [
        ("/v1/rerank", {}, {}, "url should be one of /v1/chat/completions"),
        (None, {}, {}, "url should be a text"),
        ("/v1/completions", [], {}, "body should be an object"),
        ("/v1/completions", {}, {"method": "GET"}, "method should be POST, not 'GET'"),
        ("/v1/completions", {"prompt": [1, 2]}, {}, "body should begin with text"),
        ("/v1/completions", {}, {}, "body should have one of"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, url, body, more, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"batch\.jsonl:1: {problem}"):
        made(f"batch:{write(tmp_path, url, body, **more)}", nonce="x")
