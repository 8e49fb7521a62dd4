"""Our figures against those of vLLM's own tester."""

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from server.bench.load import Load
from server.bench.results.figures import build_result
from server.bench.results.formats import as_vllm

from .rows import make_measured, make_records, make_settings

VLLM = find_spec("vllm")
QUANTILES = (50.0, 90.0, 99.0, 99.9)


def vllms_formulas():
    """Return `calculate_metrics` of vLLM's tester, without the half minute of its imports."""
    file = Path(VLLM.origin).parent / "benchmarks" / "serve.py"
    wanted = ("BenchmarkMetrics", "calculate_metrics")
    tree = ast.parse("from __future__ import annotations")
    tree.body += [
        part
        for part in ast.parse(file.read_text()).body
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and part.name in wanted
    ]
    names = {"dataclass": dataclass, "np": np, "__name__": __name__}
    names["TERM_PLOTLIB_AVAILABLE"] = False
    exec(compile(tree, file, "exec"), names)
    return names["calculate_metrics"]


@pytest.mark.skipif(VLLM is None, reason="vLLM isn't installed")
def test_the_same_requests_have_vllms_figures():
    random = np.random.default_rng(0)
    count = 300
    due = np.sort(random.uniform(0, 30, count))
    ttft = random.exponential(0.2, count)
    itls = [random.exponential(0.02, random.integers(0, 40)) for _ in range(count)]
    lasts = due + ttft + np.array([each.sum() for each in itls])
    tokens = np.array([len(each) + 1 for each in itls])
    failed = random.random(count) < 0.05
    records = make_records(
        due, due, due + ttft, lasts, failure=failed, chunks=tokens, completion_tokens=tokens,
        prompt_tokens=random.integers(5, 50, count), outcomes=["miss", "failed"], outcome=failed,
        gaps=[(row, gap) for row, each in enumerate(itls) for gap in each],
    )  # fmt: skip
    outputs = [
        SimpleNamespace(
            success=not failed[row], latency=lasts[row] - due[row], output_tokens=tokens[row],
            ttft=ttft[row], itl=itls[row].tolist(), prompt_len=records.prompt_tokens[row],
            start_time=due[row], input_audio_duration=0.0, error="",
        )
        for row in range(count)
    ]  # fmt: skip
    result = build_result(
        make_measured(records, offered_s=30.0), make_settings(load=Load(rate=10.0, duration_s=30))
    )
    theirs, lengths = vllms_formulas()([], outputs, result["elapsed_s"], None, list(QUANTILES), {})
    ours = as_vllm(result, records)
    assert ours["output_lens"] == lengths
    same = (
        "completed", "failed", "request_throughput", "output_throughput",
        "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests",
        *(f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")
          for what in ("mean", "median", "std")),
    )  # fmt: skip
    for name in same:
        assert ours[name] == pytest.approx(getattr(theirs, name)), name
    for name in ("ttft", "tpot", "itl", "e2el"):
        for p, value in getattr(theirs, f"percentiles_{name}_ms"):
            assert ours[f"p{p:g}_{name}_ms"] == pytest.approx(value)
