"""A result as a table in a terminal: whole, and a row for each outcome."""

from collections.abc import Mapping
from typing import Any

from server.bench.report.units import MISSING, in_order, percentile, rate, seconds, share
from server.terminal import table

_HEAD = (
    "", "requests", "share", "TTFT p50", "p99", "ITL p50", "E2E mean", "p50", "p99",
    "tokens/s", "generated/s",
)  # fmt: skip
_FROM_DUE = ("from due p50", "p99")
_AFTER_E2E = 9


def as_text(result: Mapping[str, Any]) -> str:
    """Return what a person wants to know first of a `result.json`."""
    whole = result["whole"]
    is_open = result["load"]["users"] is None
    outcomes = result["outcomes"]
    named = [("all", whole), *((name, outcomes[name]) for name in in_order(outcomes))]
    rows = [_row(name, found, whole["requests"], is_open=is_open) for name, found in named]
    if result["probe"]:
        rows.append(_row("probe", result["probe"], 0, is_open=is_open))
    head = (*_HEAD[:_AFTER_E2E], *_FROM_DUE * is_open, *_HEAD[_AFTER_E2E:])
    lines = [_title(result), *table(head, rows), *_notes(result, rows), *_of_verdict(result)]
    if ramp := result.get("ramp"):
        lines += _of_ramp(ramp)
    return "\n".join(lines)


def _row(name: str, figures: Mapping[str, Any], of: int, *, is_open: bool) -> tuple[str, ...]:
    end, due = figures["e2e_s"], figures["e2e_due_s"]
    return (
        name,
        f"{figures['requests']:,}",
        share(figures["requests"], of),
        percentile(figures["ttft_s"], "p50"),
        percentile(figures["ttft_s"], "p99"),
        percentile(figures["itl_s"], "p50"),
        seconds(end["mean"]) if end else MISSING,
        percentile(end, "p50"),
        percentile(end, "p99"),
        *(percentile(due, at) for at in ("p50", "p99") if is_open),
        rate(figures["tokens_served_per_s"]),
        rate(figures["tokens_generated_per_s"]),
    )


def _title(result: Mapping[str, Any]) -> str:
    workload, target = result["workload"], result["target"]
    return (
        f"{workload['name']} ({workload['cache']}) to {target['model']} at {target['url']}: "
        f"{result['whole']['requests']:,} requests, offered for {result['offered_s']:.1f} s; "
        f"{rate(result['whole']['requests_per_s'])}/s until the last answer"
    )


def _notes(result: Mapping[str, Any], rows: list[tuple[str, ...]]) -> list[str]:
    lines = []
    hits, reused = result["hit_ratio"], result["prompt_tokens_reused"]
    if hits["requests"] is not None:
        tokens = "" if hits["tokens"] is None else f", {hits['tokens']:.1%} of tokens"
        lines.append(f"hit ratio: {hits['requests']:.1%} of requests{tokens}")
    if reused["tokens"]:
        found = share(reused["tokens"], reused["of"])
        lines.append(f"misses: {found} of {reused['of']:,} prompt tokens came from a prefix cache")
    if result["errors"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in result["errors"].items())
        lines.append(f"errors: {kinds}")
    if goodput := result.get("goodput"):
        lines.append(goodput_text(goodput))
    if result["load"]["users"] is not None:
        lines.append("closed loop: users wait for answers, so times can't be corrected for that")
    if any("*" in cell for row in rows for cell in row):
        lines.append("*: too few samples beyond this percentile")
    return lines


def goodput_text(goodput: Mapping[str, Any]) -> str:
    """Return in words how often an objective was attained."""
    text = (
        f"objective {goodput['objective']}: attained by {goodput['attainment']:.1%}, "
        f"{rate(goodput['requests_per_s'])} requests/s"
    )
    if unseen := " or ".join(goodput["unseen"]):
        text += f"; no request was {unseen}, so that limit bound none"
    return text


def _of_verdict(result: Mapping[str, Any]) -> list[str]:
    head = "valid" if result["valid"] else "INVALID: compare refuses this run"
    if result["interrupted"]:
        head += ", interrupted"
    # How exact times are is told in any case: a p99 below it is the client's.
    told = [
        check["text"]
        for check in result["verdict"]
        if not check["ok"] or check["check"] in ("lateness_p99_s", "loop_lag_p99_s")
    ]
    return [head, *(f"  {text}" for text in told)]


def _of_ramp(ramp: Mapping[str, Any]) -> list[str]:
    lines = [f"ramp: {ramp['text']}"]
    for name in in_order(ramp["outcomes"]):
        found = ramp["outcomes"][name]
        kept = found["highest_kept"]
        held = "at no rate" if kept is None else f"up to {rate(kept)} sessions/s"
        part = found["at_knee"]
        at_knee = "" if part is None else f"; at the knee {rate(part['requests_per_s'])}/s kept it"
        lines.append(f"  {name}: its own requests keep the objective {held}{at_knee}")
    return lines
