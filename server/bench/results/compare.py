"""`tierserve bench compare A B`: how many times as much each figure of B is as that of A."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.bench.records import Records
from server.bench.results import fail_if
from server.bench.results.latencies import LATENCIES, Sample, latencies
from server.bench.results.resample import (
    Blocks,
    Interval,
    combined_interval,
    make_blocks,
    mean_interval,
    ratio_interval,
    resample,
)
from server.bench.results.result import Run
from server.bench.results.statistics import QUANTILES, wilson
from server.config.base import ConfigError
from server.terminal import table

_PLAIN = ("failed", "requests_per_s", "tokens_served_per_s", "tokens_generated_per_s")
"""Figures that a run has once, so they have no interval."""
_Samples = Mapping[str, Mapping[str, Sample]]


def compare(a: Run, b: Run, rules: Sequence[str] = ()) -> dict[str, Any]:
    """Return the ratios b/a of all figures that both runs have, by outcome, and what rules say.

    Intervals are of a bootstrap over requests where both runs have them, and of the results'
    own intervals elsewhere.

    Raises:
        ConfigError: a run is invalid, the workloads differ, or a rule is wrong.
    """
    _check_comparable(a, b)
    parsed = [fail_if.parse(rule) for rule in rules]
    figures = dict(_figures(a, b))
    return {
        "a": _about(a),
        "b": _about(b),
        "notes": _notes(a, b),
        "figures": figures,
        "fail_if": [rule.judge(figures) for rule in parsed],
    }


def fails(comparison: Mapping[str, Any]) -> bool:
    """Return whether a rule of `--fail-if` holds: then the command's exit status is 1."""
    return any(rule["holds"] for rule in comparison["fail_if"])


def _check_comparable(a: Run, b: Run) -> None:
    mistakes = [
        f"compare: {run.name} is no valid run: {check['text']}"
        for run in (a, b)
        for check in run.result["verdict"]
        if not check["ok"]
    ]
    for name in ("digest", "cache"):
        of_a, of_b = (run.result["workload"][name] for run in (a, b))
        if of_a != of_b:
            what = "workload" if name == "digest" else "state of the cache"
            kinds = " and ".join(
                f"{run.result['workload']['name']} ({run.result['workload'][name]})"
                for run in (a, b)
            )
            should = f"both runs should have the same {what}, not {kinds}"
            mistakes.append(f"compare: {should}: only equal requests have comparable latencies")
    if mistakes:
        raise ConfigError(mistakes)


def _about(run: Run) -> dict[str, Any]:
    kept = ("tierserve", "began", "workload", "load", "target", "machine")
    return {"name": run.name, **{name: run.result.get(name) for name in kept}}


def _notes(a: Run, b: Run) -> list[str]:
    loads = [run.result["load"] for run in (a, b)]
    notes = [
        f"the loads differ: {name} is {of_a} in A and {loads[1].get(name)} in B"
        for name, of_a in loads[0].items()
        if of_a != loads[1].get(name)
    ]
    if a.result.get("machine") != b.result.get("machine"):
        notes.append("the clients' machines differ")
    missing = [run.name for run in (a, b) if run.records is None]
    if missing:
        notes.append(
            f"{' and '.join(missing)} has no records.npz, so intervals are of the results' own, "
            "which take requests for independent"
        )
    return notes


def _figures(a: Run, b: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    blocks, of_a, of_b = _samples(a.records, b.records, a, b)
    for name in ("whole", *(name for name in a.result["outcomes"] if name in b.result["outcomes"])):
        whole_a, whole_b = (
            run.result["whole"] if name == "whole" else run.result["outcomes"][name]
            for run in (a, b)
        )
        for field in _PLAIN:
            yield f"{name}.{field}", _figure(whole_a[field], whole_b[field], None)
        for metric in LATENCIES:
            first, second = whole_a[metric], whole_b[metric]
            if first is None or second is None:
                continue
            intervals = _stored_intervals(first, second)
            if blocks is not None:
                resampled = _resampled_intervals(
                    of_a.get(name, {}).get(metric), of_b.get(name, {}).get(metric), blocks
                )
                intervals.update(resampled)
            few = {*first["too_few"], *second["too_few"]}
            for statistic in ("mean", *QUANTILES):
                found = _figure(first[statistic], second[statistic], intervals.get(statistic))
                yield f"{name}.{metric}.{statistic}", {**found, "too_few": statistic in few}
    yield from _hit_ratios(a, b)


def _figure(a: float, b: float, interval: Interval | None) -> dict[str, Any]:
    low, high = (None, None) if interval is None else interval
    return {"a": a, "b": b, "ratio": b / a if a else None, "low": low, "high": high,
            "too_few": False}  # fmt: skip


def _stored_intervals(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Interval | None]:
    found = {
        name: combined_interval(a[name], a["ci"][name], b[name], b["ci"][name])
        for name in QUANTILES
        if name in a["ci"] and name in b["ci"]
    }
    found["mean"] = combined_interval(a["mean"], mean_interval(a), b["mean"], mean_interval(b))
    return found


def _samples(
    first: Records | None, second: Records | None, a: Run, b: Run
) -> tuple[Blocks | None, _Samples, _Samples]:
    """Return both runs' latencies by outcome, and the blocks of their rows."""
    if first is None or second is None:
        return None, {}, {}
    first, second = first.where(~first.probe), second.where(~second.probe)
    blocks = make_blocks(first.session, second.session)
    return blocks, _by_outcome(first, a), _by_outcome(second, b)


def _by_outcome(records: Records, run: Run) -> dict[str, dict[str, Sample]]:
    whole = latencies(records, open_loop=run.result["load"].get("users") is None)
    found = {"whole": whole}
    for number, name in enumerate(records.outcomes):
        found[name] = {}
        for metric, sample in whole.items():
            own = records.outcome[sample.rows] == number
            found[name][metric] = Sample(sample.values[own], sample.rows[own])
    return found


def _resampled_intervals(
    a: Sample | None, b: Sample | None, blocks: Blocks
) -> dict[str, Interval | None]:
    if a is None or b is None or not len(a.values) or not len(b.values):
        return {}
    of_a = resample(a.values, blocks.of_a[a.rows], blocks.weights)
    of_b = resample(b.values, blocks.of_b[b.rows], blocks.weights)
    return {name: ratio_interval(of_a[name], of_b[name]) for name in of_a}


def _hit_ratios(a: Run, b: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("requests", "tokens"):
        shares = [run.result["hit_ratio"][name] for run in (a, b)]
        if None in shares:
            continue
        interval = None
        if name == "requests":
            counts = [run.result["whole"]["requests"] - run.result["whole"]["failed"]
                      for run in (a, b)]  # fmt: skip
            limits = [
                wilson(round(share * count), count)
                for share, count in zip(shares, counts, strict=True)
            ]
            interval = combined_interval(shares[0], limits[0], shares[1], limits[1])
        yield f"hit_ratio.{name}", _figure(shares[0], shares[1], interval)


def as_text(comparison: Mapping[str, Any]) -> str:
    """Return a comparison as a table: medians and p99, and what rules say."""
    figures: Mapping[str, Mapping[str, Any]] = comparison["figures"]
    rows = [
        (name, f"{found['a']:.4g}", f"{found['b']:.4g}", *_ratio_cells(found))
        for name, found in figures.items()
        if name.rpartition(".")[2] in {"p50", "requests_per_s", "requests", "tokens"}
        or name.endswith(".p99")
        or (name.endswith(".failed") and (found["a"] or found["b"]))
    ]
    lines = [
        f"A {comparison['a']['name']}, B {comparison['b']['name']}",
        *table(("figure", "A", "B", "B/A", "95% between"), rows),
        *comparison["notes"],
        *(rule["text"] for rule in comparison["fail_if"]),
    ]
    if any("*" in row[3] for row in rows):
        lines.append("*: too few samples beyond this percentile")
    return "\n".join(lines)


def _ratio_cells(found: Mapping[str, Any]) -> tuple[str, str]:
    ratio = "" if found["ratio"] is None else f"{found['ratio']:.3g}x"
    between = "" if found["low"] is None else f"{found['low']:.3g}x to {found['high']:.3g}x"
    return ratio + "*" * found["too_few"], between
