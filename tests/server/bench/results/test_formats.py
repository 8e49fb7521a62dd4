from pathlib import Path

import numpy as np
import orjson
import pytest
from jsonschema import Draft202012Validator

from server.bench.load import Load
from server.bench.records import Failure
from server.bench.results.figures import build_result
from server.bench.results.formats import as_benchmark_reports, as_vllm
from server.bench.results.objective import parse

from .rows import make_measured, make_records, make_settings

REPORT_SCHEMA = Path("tests/data/benchmark_report_0.2.1.schema.json")
KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls",
    "latencies", "start_times", "queue_times", "generated_texts", "errors",
    "max_output_tokens_per_s", "max_concurrent_requests", "rtfx",
}  # fmt: skip
"""What vLLM 0.32 writes with --save-detailed; statistics of four latencies come on top."""


def make_result(**settings):
    records = make_records(
        [0.0, 1.0, 2.0, 2.5], sent=[0.0, 1.5, 2.0, 2.5], first_token=[0.1, 1.6, 2.2, 2.6],
        last_token=[0.3, 1.6, 2.2, 2.6], outcomes=["failed", "memory", "miss"],
        outcome=[2, 1, 0, 1], failure=[0, 0, Failure.TIMEOUT, 0],
        probe=[False, False, False, True], gaps=[(0, 0.05), (0, 0.15)],
    )  # fmt: skip
    settings = {"objective": parse("e2e=1s"), **settings}
    return build_result(make_measured(records), make_settings(**settings)), records


@pytest.mark.parametrize("load", [Load(rate=10.0, duration_s=10), Load(users=3, sessions=9)])
def test_vllms_format_has_its_keys_and_a_row_for_each_request(load):
    found = as_vllm(*make_result(load=load))
    statistics = {
        f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")
        for what in ("mean", "median", "std", "p50", "p90", "p99", "p99.9")
    }  # fmt: skip
    assert found.keys() == KEYS | statistics
    assert found["ttfts"] == pytest.approx([0.1, 0.1, 0.0])
    assert found["latencies"] == pytest.approx([0.3, 0.1, 0.0])
    assert found["queue_times"] == pytest.approx([0.0, 0.5, 0.0])
    assert found["itls"] == [[0.05, 0.15], [], []]
    assert found["output_lens"] == [5, 5, 0]
    assert found["errors"] == ["", "", "timeout"]
    assert (found["completed"], found["failed"], found["num_prompts"]) == (2, 1, 3)
    assert found["mean_ttft_ms"] == pytest.approx(100)
    assert found["endpoint_type"] == "openai-chat"
    assert found["request_rate"] == ("inf" if load.users else 10.0)
    assert orjson.loads(orjson.dumps(found)) == found


def test_vllms_format_of_a_run_without_answers():
    nothing = make_records([], outcomes=())
    failed = make_records(
        [0.0], np.nan, [np.nan], failure=Failure.CONNECT, outcomes=["failed"], end=1.0
    )
    for records in (nothing, failed):
        result = build_result(make_measured(records), make_settings())
        found = as_vllm(result, records)
        assert found["mean_ttft_ms"] == 0.0
        assert found["max_concurrent_requests"] == 0
        assert all(np.isfinite(found["start_times"]))


@pytest.mark.parametrize("load", [Load(rate=10.0, duration_s=10), Load(users=3, sessions=9)])
def test_benchmark_reports_keep_their_schema(load):
    result, _ = make_result(load=load)
    reports = as_benchmark_reports(result)
    validator = Draft202012Validator(orjson.loads(REPORT_SCHEMA.read_bytes()))
    for report in reports.values():
        validator.validate(orjson.loads(orjson.dumps(report)))
    assert reports.keys() == {"whole", "failed", "memory", "miss"}
    runs = [report["run"] for report in reports.values()]
    assert len({run["eid"] for run in runs}) == 1
    assert len({run["uid"] for run in runs}) == 4
    aggregate = reports["miss"]["results"]["request_performance"]["aggregate"]
    assert aggregate["latency"]["request_latency"]["p99"] == pytest.approx(0.3)
    assert aggregate["requests"]["total"] == 1
    assert "latency" in reports["failed"]["results"]["request_performance"]["aggregate"]
    assert "secret" not in str(reports)
