"""Results in formats that other tools read: vLLM's result, and llm-d's Benchmark Report 0.2.1."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from server.bench.records import Failure, Floats, Records
from server.bench.results.latencies import answered, completion_tokens, first_token, last_token
from server.bench.results.statistics import QUANTILES

_BACKENDS = {
    "/v1/chat/completions": "openai-chat",
    "/v1/completions": "openai",
    "/v1/embeddings": "openai-embeddings",
}
"""vLLM's names of routes; others stay as they are."""
_VLLM_METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "itl": "itl_s", "e2el": "e2e_s"}
_NO_TIMES = dict.fromkeys(("mean", "std", *QUANTILES), 0.0)
"""vLLM writes 0 where nothing was measured."""


def as_vllm(result: Mapping[str, Any], records: Records) -> dict[str, Any]:
    """Return a run as `vllm bench serve --save-result --save-detailed` writes it.

    Times of lists are seconds, others milliseconds. `generated_texts` are empty: we keep none.
    `goodput` counts from sending in vLLM, and from when a request was due here, in an open loop.
    """
    records = records.where(~records.probe)
    load, whole, goodput = result["load"], result["whole"], result["goodput"]
    began, elapsed_s = datetime.fromisoformat(result["began"]), result["elapsed_s"]
    backend = _BACKENDS.get(result["target"]["path"], result["target"]["path"])
    is_answered = answered(records)
    content = {
        "date": began.astimezone().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": result["workload"]["name"],
        "model_id": result["target"]["model"],
        "tokenizer_id": result["target"]["model"],
        "num_prompts": len(records),
        "request_rate": "inf" if load["rate"] is None else load["rate"],
        "burstiness": load["burstiness"],
        "max_concurrency": load["users"],
        "duration": elapsed_s,
        "completed": whole["requests"] - whole["failed"],
        "failed": whole["failed"],
        "total_input_tokens": whole["prompt_tokens"],
        "total_output_tokens": whole["completion_tokens"],
        "request_throughput": whole["requests_per_s"],
        "request_goodput": None if goodput is None else goodput["requests_per_s"],
        "output_throughput": whole["tokens_served_per_s"],
        "total_token_throughput": whole["tokens_served_per_s"]
        + (whole["prompt_tokens"] / elapsed_s if elapsed_s else 0.0),
        "input_lens": np.maximum(records.prompt_tokens, 0).tolist(),
        "output_lens": np.where(is_answered, completion_tokens(records), 0).tolist(),
        "ttfts": _or_0(first_token(records) - records.sent, is_answered),
        "itls": [gaps.tolist() for gaps in _gaps_by_row(records)],
        "latencies": _or_0(last_token(records) - records.sent, is_answered),
        "start_times": np.nan_to_num(records.sent).tolist(),
        "queue_times": np.nan_to_num(records.sent - records.due).tolist(),
        "generated_texts": [""] * len(records),
        "errors": [
            "" if failure == Failure.NONE else Failure(failure).name.lower()
            for failure in records.failure.tolist()
        ],
        **_peaks(records),
        "rtfx": 0.0,
    }
    for name, metric in _VLLM_METRICS.items():
        spread = whole[metric] or _NO_TIMES
        content[f"mean_{name}_ms"] = spread["mean"] * 1e3
        content[f"median_{name}_ms"] = spread["p50"] * 1e3
        content[f"std_{name}_ms"] = spread["std"] * 1e3
        content.update({f"{p}_{name}_ms": spread[p] * 1e3 for p in QUANTILES})
    return content


def _or_0(values: Floats, where: np.ndarray) -> list[float]:
    found: list[float] = np.where(where, values, 0.0).tolist()
    return found


def _gaps_by_row(records: Records) -> list[Floats]:
    if len(records) == 0:
        return []
    order = np.argsort(records.gap_row, kind="stable")
    ends = np.cumsum(np.bincount(records.gap_row, minlength=len(records)))
    return np.split(records.gaps[order], ends[:-1])


def _peaks(records: Records) -> dict[str, float]:
    """Return vLLM's peaks, of the seconds since the first whole answer's request was sent."""
    records = records.where(answered(records))
    if len(records) == 0:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    start = records.sent.min()
    order = np.argsort(records.gap_row, kind="stable")
    rows, passed = records.gap_row[order], np.cumsum(records.gaps[order])
    before = np.concatenate(([0.0], passed))[np.searchsorted(rows, rows)]
    firsts = first_token(records)
    tokens = np.concatenate((firsts, firsts[rows] + passed - before))
    per_s = np.bincount(_second(tokens, start))
    changes = np.bincount(_second(records.sent, start), minlength=len(per_s) + 2)
    left = np.bincount(_second(last_token(records), start) + 1)
    size = max(len(changes), len(left))
    running = np.cumsum(_padded(changes, size) - _padded(left, size))
    return {
        "max_output_tokens_per_s": float(per_s.max()),
        "max_concurrent_requests": int(running.max()),
    }


def _second(times: Floats, start: float) -> np.ndarray:
    return np.maximum(times - start, 0).astype(np.int64)


def _padded(counts: np.ndarray, size: int) -> np.ndarray:
    return np.pad(counts, (0, size - len(counts)))


def as_benchmark_reports(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return Benchmark Reports: of the whole run, and of each outcome, with a shared `run.eid`.

    The format has no place for outcomes, and forbids fields of one's own.
    """
    parts = {"whole": result["whole"], **result["outcomes"]}
    return {name: _report(result, name, figures) for name, figures in parts.items()}


def _report(result: Mapping[str, Any], name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    began = datetime.fromisoformat(result["began"])
    experiment = f"tierserve:{result['workload']['digest']}:{result['began']}"
    workload, target = result["workload"], result["target"]
    return {
        "version": "0.2.1",
        "run": {
            "uid": str(uuid5(NAMESPACE_URL, f"{experiment}:{name}")),
            "eid": str(uuid5(NAMESPACE_URL, experiment)),
            "time": {
                "start": result["began"],
                "end": (began + timedelta(seconds=result["elapsed_s"])).isoformat(),
                "duration": f"PT{result['elapsed_s']}S",
            },
            "description": f"{target['model']}: {workload['name']}, {name}",
            "keywords": [f"outcome:{name}", f"cache:{workload['cache']}"],
        },
        "scenario": {"load": _scenario(result, figures)},
        "results": {"request_performance": {"aggregate": _aggregate(result, figures)}},
    }


def _scenario(result: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    load, workload = result["load"], result["workload"]
    done = figures["requests"] - figures["failed"]
    mean_prompt = figures["prompt_tokens"] / done if done else 0
    standardized = {
        "tool": "tierserve bench",
        "tool_version": result["tierserve"],
        "parallelism": load["processes"],
        "source": "unknown",
        "input_seq_len": {"distribution": "other", "value": mean_prompt},
    }
    if load["rate"] is not None:
        standardized["rate_qps"] = load["rate"]
    if load["users"] is not None:
        standardized["concurrency"] = load["users"]
    return {
        "metadata": {"cfg_id": workload["digest"], "description": workload["name"]},
        "standardized": standardized,
        "native": {"config": {"load": load, "workload": workload, "target": result["target"]}},
    }


def _aggregate(result: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    done, elapsed_s = figures["requests"] - figures["failed"], result["elapsed_s"]
    prompt_per_s = figures["prompt_tokens"] / elapsed_s if elapsed_s else 0.0
    served_per_s = figures["tokens_served_per_s"]
    requests: dict[str, Any] = {"total": figures["requests"], "failures": figures["failed"]}
    if done:
        requests["input_length"] = _mean("count", figures["prompt_tokens"] / done)
        requests["output_length"] = _mean("count", figures["completion_tokens"] / done)
    latency = {
        "time_to_first_token": _spread("s", figures["ttft_s"]),
        "time_per_output_token": _spread("s/token", figures["tpot_s"]),
        "inter_token_latency": _spread("s/token", figures["itl_s"]),
        "request_latency": _spread("s", figures["e2e_s"]),
    }
    return {
        "requests": requests,
        "latency": {name: spread for name, spread in latency.items() if spread is not None},
        "throughput": {
            "input_token_rate": _mean("tokens/s", prompt_per_s),
            "output_token_rate": _mean("tokens/s", served_per_s),
            "total_token_rate": _mean("tokens/s", prompt_per_s + served_per_s),
            "request_rate": _mean("queries/s", figures["requests_per_s"]),
        },
    }


def _mean(units: str, value: float) -> dict[str, Any]:
    return {"units": units, "mean": value}


def _spread(units: str, found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    same = {name: found[name] for name in ("mean", "min", "p50", "p90", "p99", "max")}
    return {"units": units, "stddev": found["std"], "p99p9": found["p99.9"], **same}
