"""Every workload of `tierserve bench` for some requests, against the real engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server.bench.results.result_schema import as_json_schema
from server.bench.workloads import NAMES
from server.cli import main
from tests.e2e.conftest import MODEL, Server

pytestmark = pytest.mark.engine

FILES = {
    "mtbench": "",
    "mooncake": "tests/data/mooncake_synthetic_trace.jsonl,scale=0.02,max_prompt_tokens=64",
    "azure": "tests/data/azure_llm_code.csv,scale=0.01",
}
MADE: dict[str, list[Any]] = {
    "sharegpt": [{"conversations": [{"from": "human", "value": f"Why {n}?"},
                                    {"from": "gpt", "value": "So."}]} for n in range(3)],
    "batch": [{"method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello"}},
              {"method": "POST", "url": "/v1/responses", "body": {"input": "Hello"}},
              {"method": "POST", "url": "/v1/messages",
               "body": {"messages": [{"role": "user", "content": "Hello"}]}}],
    "custom": [{"prompt": f"Say {n}.", "output_tokens": 2} for n in range(3)],
    "bailian": [{"chat_id": n, "parent_chat_id": -1, "timestamp": n / 10, "input_length": 20,
                 "output_length": 2, "type": "text", "turn": 1, "hash_ids": [1, n]}
                for n in range(3)],
    "trace": [{"time": 100 + n, "key": f"{n % 2}" * 16, "size": 500, "tokens": 2, "tier": "memory",
               "outcome": "hit"} for n in range(3)],
}  # fmt: skip
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
1,ChatGPT,20,2,22,Conversation log
2,ChatGPT,30,2,32,Conversation log
"""


@pytest.fixture
def bench(ready: Server, capsys) -> Callable[..., dict[str, Any]]:
    """Run the command; what it says of the machine's speed doesn't matter."""

    def run(*options: str) -> dict[str, Any]:
        admin = str(ready.temporary / "admin.sock")
        few = ["--requests", "3", "--max-tokens", "2", "--json"]
        status = main(["bench", ready.url, "--admin", admin, *few, *options])
        said = capsys.readouterr()
        assert status in (0, 1), said.err
        result = json.loads(said.out)
        assert result["errors"] == {}
        return result

    return run


def spec(kind: str, folder: Path) -> str:
    """Return the text that names a workload of a kind, with a file of it."""
    if kind in FILES:
        return f"{kind}:{FILES[kind]}".rstrip(":")
    if kind == "burstgpt":
        (folder / "trace.csv").write_text(BURSTGPT)
        return f"burstgpt:{folder}/trace.csv"
    if kind in MADE:
        lines = [json.dumps(each) for each in MADE[kind]]
        whole = f"[{', '.join(lines)}]" if kind == "sharegpt" else "\n".join(lines) + "\n"
        (folder / "file").write_text(whole)
        return f"{kind}:{folder}/file"
    return kind


@pytest.mark.parametrize("kind", NAMES)
def test_every_workload(bench, tmp_path: Path, kind: str) -> None:
    shape = {
        "agents": "agents:steps=2,system=64",
        "chat": "chat:turns=2,think=0",
        "conversation": "conversation:turns=2,think=0",
        "prefix": "prefix:system=64",
    }
    result = bench("--workload", shape.get(kind, spec(kind, tmp_path)), "--users", "2")
    assert result["target"]["model"] == MODEL
    whole = result["whole"]
    assert whole["requests"] >= 2
    # Streams tell how many tokens they have.
    assert whole["prompt_tokens"] >= whole["requests"] <= whole["completion_tokens"]
    assert set(result["outcomes"]) <= {"memory", "disk", "miss", "collapsed"}


@pytest.mark.parametrize("route", ["completions", "responses", "messages"])
def test_routes_without_streams(bench, route: str) -> None:
    shape = "chat:turns=2,system=4,think=0"
    result = bench("--route", route, "--no-stream", "--workload", shape, "--rate", "20")
    assert result["whole"]["completion_tokens"] >= result["whole"]["requests"] == 6


def test_what_is_written(bench, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--format", "vllm,br"]
    result = bench("--workload", "zipf:prompts=1", "--cache", "warm", *out)
    assert set(result["outcomes"]) == {"memory"}
    assert json.loads((tmp_path / "result.json").read_text()) == result
    jsonschema.validate(result, json.loads(as_json_schema()))
    for name in ("report.html", "records.npz", "vllm.json", "benchmark_report_memory.json"):
        assert (tmp_path / name).stat().st_size > 0
