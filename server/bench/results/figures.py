"""The figures of a run: whole and by outcome, as `result.json` has them."""

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from server.bench.load import Measured
from server.bench.records import Failure, Records
from server.bench.results.latencies import LATENCIES, answered, completion_tokens, is_hit, latencies
from server.bench.results.result import Settings
from server.bench.results.series import over_time
from server.bench.results.statistics import summarize
from server.bench.results.verdict import judge
from server.config.base import VERSION


def build_result(measured: Measured, settings: Settings) -> dict[str, Any]:
    """Return everything that is known of a run, in the shape of `result_schema.Result`.

    Throughput is over the time from the schedule's start to the last end, as vLLM's is, or the
    time for which load was offered if that is longer.
    """
    records = measured.records.where(~measured.records.probe)
    probe = measured.records.where(measured.records.probe)
    open_loop = settings.load.users is None
    last = float(records.end.max()) if len(records) else measured.began
    elapsed_s = max(last - measured.began, measured.offered_s)
    checks = judge(measured, settings.load)
    by_outcome = {
        name: figures(records.where(rows), elapsed_s, open_loop=open_loop)
        for number, name in enumerate(records.outcomes)
        if (rows := records.outcome == number).any()
    }
    objective = settings.objective
    return {
        "version": 1,
        "tierserve": VERSION,
        "valid": all(check.ok for check in checks),
        "verdict": [check.as_json() for check in checks],
        "interrupted": measured.interrupted,
        "workload": {
            "name": settings.workload,
            "digest": settings.digest,
            "seed": settings.seed,
            "cache": settings.cache,
        },
        "load": asdict(settings.load),
        "target": {
            "url": settings.shown_url(),
            "model": settings.model,
            "path": settings.path,
        },
        "began": datetime.fromtimestamp(measured.began_unix, UTC).isoformat(),
        "offered_s": measured.offered_s,
        "elapsed_s": elapsed_s,
        "scheduled": measured.scheduled,
        "machine": dict(settings.machine),
        "whole": figures(records, elapsed_s, open_loop=open_loop),
        "outcomes": by_outcome,
        "probe": figures(probe, elapsed_s, open_loop=True) if len(probe) else None,
        "hit_ratio": hit_ratio(records),
        "prompt_tokens_reused": prompt_tokens_reused(records),
        "errors": errors(records),
        "goodput": None
        if objective is None
        else objective.attainment(records, elapsed_s, open_loop=open_loop),
        "series": over_time(records, measured.began, elapsed_s, open_loop=open_loop),
    }


def figures(records: Records, elapsed_s: float, *, open_loop: bool) -> dict[str, Any]:
    """Return the `FIGURES` of some requests.

    `requests` has the failed ones, rates and tokens are of whole answers. Tokens served are all
    that answers hold; generated are those that no cache gave.
    """
    whole = answered(records)
    tokens = completion_tokens(records)
    served = int(tokens[whole].sum())
    generated = int(tokens[whole & ~is_hit(records)].sum())
    samples = latencies(records, open_loop=open_loop)
    spreads = {
        name: summarize(samples[name].values) if name in samples else None for name in LATENCIES
    }
    return {
        "requests": len(records),
        "failed": int((~whole).sum()),
        "requests_per_s": _per_s(whole.sum(), elapsed_s),
        "prompt_tokens": _told(records.prompt_tokens[whole]),
        "completion_tokens": served,
        "cached_tokens": _told(records.cached_tokens[whole]),
        "loaded_tokens": int(records.loaded_tokens[whole].sum()),
        "tokens_served_per_s": _per_s(served, elapsed_s),
        "tokens_generated_per_s": _per_s(generated, elapsed_s),
        **spreads,
    }


def hit_ratio(records: Records) -> dict[str, float | None]:
    """Return which share of answers, and of their prompts' and own tokens, was a hit."""
    whole, hits = answered(records), is_hit(records)
    tokens = np.maximum(records.prompt_tokens, 0) + completion_tokens(records)
    return {
        "requests": _ratio(hits.sum(), whole.sum()),
        "tokens": _ratio(tokens[hits].sum(), tokens[whole].sum()),
    }


def prompt_tokens_reused(records: Records) -> dict[str, int]:
    """Return how much of the prompts that reached an engine it had not to compute.

    `cached_tokens` of an engine contain what the prefix tier loaded; an engine that doesn't tell
    them still has what `Cache-Status` says. Hits repeat the usage of their first time, so they
    don't count.
    """
    misses = answered(records) & ~is_hit(records)
    reused = np.maximum(records.cached_tokens, records.loaded_tokens)[misses]
    return {"tokens": _told(reused), "of": _told(records.prompt_tokens[misses])}


def errors(records: Records) -> dict[str, int]:
    """Return how many requests failed, by kind, the most frequent first."""
    failed = ~answered(records)
    kinds = Counter(
        f"status {status}" if failure == Failure.STATUS else Failure(failure).name.lower()
        for failure, status in zip(
            records.failure[failed].tolist(), records.status[failed].tolist(), strict=True
        )
    )
    return dict(kinds.most_common())


def _told(tokens: np.ndarray) -> int:
    """Return the sum of those that are known; -1 stands for the others."""
    return int(np.maximum(tokens, 0).sum())


def _per_s(count: Any, elapsed_s: float) -> float:
    return float(count / elapsed_s) if elapsed_s else 0.0


def _ratio(part: Any, of: Any) -> float | None:
    return float(part / of) if of else None
