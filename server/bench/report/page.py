"""A result as one HTML page that needs nothing else: no script, no font, no network.

Everything that a person or a server named is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from server.bench.records import Records
from server.bench.report.plots import Plot, colour, draw
from server.bench.report.table import goodput_text
from server.bench.report.units import (
    MISSING,
    in_order,
    percentile,
    rate,
    seconds,
    share,
    three_digits,
)
from server.config.base import ConfigError

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_PERCENTILES = ("p50", "p90", "p99", "p99.9")
_LATENCIES = (
    ("ttft_s", "First token, from sending"),
    ("ttft_due_s", "First token, from when it was due"),
    ("tpot_s", "Time per output token"),
    ("itl_s", "Between tokens"),
    ("e2e_s", "Whole answer, from sending"),
    ("e2e_due_s", "Whole answer, from when it was due"),
)


def write_page(result: Mapping[str, Any], records: Records, began: float, file: Path) -> None:
    """Write the page.

    Args:
        result: of the run, as `result.json` has it.
        records: what the plots show.
        began: CLOCK_MONOTONIC at which the schedule began.
        file: is written anew.

    Raises:
        ConfigError: the file can't be written.
    """
    is_open = result["load"]["users"] is None
    plots = draw(records, began, is_open=is_open)
    try:
        file.write_text(as_page(result, plots), encoding="utf-8")
    except OSError as exc:
        raise ConfigError([f"--out: {file} can't be written: {exc.strerror or exc}"]) from exc


def as_page(result: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    """Return the page's HTML."""
    workload, target = result["workload"], result["target"]
    title = f"{workload['name']} to {target['model']}"
    parts = [
        f"<header><h1>{escape(title)}</h1>{_subtitle(result)}</header>",
        _verdict(result),
        _cards(result),
        _section("Ramp", _ramp(result["ramp"])) if result.get("ramp") else "",
        _section("By outcome", _by_outcome(result)),
        _section("Over time and as distributions", _plots(plots)) if plots else "",
        _section("Latencies", "".join(_latencies(result))),
        _section("The run", _of_the_run(result)),
        _NOTES,
    ]
    return _DOCUMENT.format(title=escape(title), style=_STYLE, body="\n".join(parts))


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
_NOTES = """<section class="notes"><h2>How to read it</h2><ul>
<li>Outcomes say who answered: a cache tier, another request under way (collapsed), or the engine
(miss). Percentiles over hits and misses together describe neither.</li>
<li>Times from sending are those of other testers. Times from when a request was due also hold what
it waited for before it could be sent: they are what users feel.</li>
<li>Tokens served were sent to clients; tokens generated were computed for them.</li>
<li>*: too few samples lie beyond this percentile. In brackets: 95% confidence intervals.</li>
</ul></section>"""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _subtitle(result: Mapping[str, Any]) -> str:
    began = result["began"][:19].replace("T", " ")
    text = f"{result['target']['url']} · {began} UTC · tierserve {result['tierserve']}"
    return f"<p>{escape(text)}</p>"


def _verdict(result: Mapping[str, Any]) -> str:
    ok = result["valid"]
    text = "Valid run" if ok else "Invalid run: its figures tell little, and can't be compared"
    if result["interrupted"]:
        text += " (interrupted)"
    checks = "".join(
        f'<li class="{"ok" if check["ok"] else "bad"}">{escape(check["text"])}</li>'
        for check in result["verdict"]
    )
    if goodput := result.get("goodput"):
        checks += f'<li class="info">{escape(goodput_text(goodput))}</li>'
    kind = "ok" if ok else "bad"
    return f'<section class="verdict {kind}"><h2>{text}</h2><ul>{checks}</ul></section>'


def _cards(result: Mapping[str, Any]) -> str:
    whole, hits = result["whole"], result["hit_ratio"]
    end, first = whole["e2e_s"], whole["ttft_s"]
    cards = [
        ("requests/s", rate(whole["requests_per_s"]), f"{whole['requests']:,} requests"),
        ("hit ratio", MISSING if hits["requests"] is None else f"{hits['requests']:.1%}",
         "" if hits["tokens"] is None else f"{hits['tokens']:.1%} of tokens"),
        ("whole answer, mean", seconds(end["mean"]) if end else MISSING,
         f"p50 {percentile(end, 'p50')}, p99 {percentile(end, 'p99')}"),
        ("first token, p50", percentile(first, "p50"), f"p99 {percentile(first, 'p99')}"),
        ("tokens served/s", rate(whole["tokens_served_per_s"]),
         f"generated {rate(whole['tokens_generated_per_s'])}/s"),
        ("failed", f"{whole['failed']:,}", share(whole["failed"], whole["requests"])),
    ]  # fmt: skip
    return '<div class="cards">' + "".join(
        f"<div><b>{value}</b><span>{name}</span><small>{more}</small></div>"
        for name, value, more in cards
    ) + "</div>"  # fmt: skip


def _rows_of(result: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "all", result["whole"]
    for name in in_order(result["outcomes"]):
        yield name, result["outcomes"][name]
    if result.get("probe"):
        yield "probe", result["probe"]


def _name(name: str) -> str:
    dot = "" if name in ("all", "probe") else f'<i style="background:{colour(name)}"></i>'
    return f"{dot}{escape(name)}"


def _by_outcome(result: Mapping[str, Any]) -> str:
    head = ("", "requests", "share", "requests/s", "first token p50", "p99",
            "between tokens p50", "whole answer p50", "p99", "from due p99",
            "tokens served/s", "generated/s")  # fmt: skip
    rows = []
    for name, found in _rows_of(result):
        part = share(found["requests"], result["whole"]["requests"])
        rows.append((
            _name(name), f"{found['requests']:,}", MISSING if name == "probe" else part,
            rate(found["requests_per_s"]),
            percentile(found["ttft_s"], "p50"), percentile(found["ttft_s"], "p99"),
            percentile(found["itl_s"], "p50"),
            percentile(found["e2e_s"], "p50"), percentile(found["e2e_s"], "p99"),
            percentile(found["e2e_due_s"], "p99"),
            rate(found["tokens_served_per_s"]), rate(found["tokens_generated_per_s"]),
        ))  # fmt: skip
    return _table(head, rows)


def _ramp(ramp: Mapping[str, Any]) -> str:
    head = ("sessions/s", "kept the objective", "95% between", "verdict")
    rows = []
    for probe in sorted(ramp["probes"], key=lambda probe: float(probe["rate"])):
        low, high = probe["interval"]
        verdict = f"{'holds' if probe['passed'] else 'fails'}: {probe['reason']}"
        rows.append((rate(probe["rate"]), f"{probe['attainment']:.2%}",
                     f"{low:.2%} and {high:.2%}", escape(verdict)))  # fmt: skip
    return f"<p>{escape(ramp['text'])}</p>{_table(head, rows, 'told')}"


def _latencies(result: Mapping[str, Any]) -> Iterable[str]:
    for key, title in _LATENCIES:
        rows = []
        for name, found in _rows_of(result):
            if spread := found.get(key):
                cells = [_with_interval(spread, at) for at in _PERCENTILES]
                rows.append((_name(name), f"{spread['count']:,}", seconds(spread["mean"]), *cells,
                             seconds(spread["max"])))  # fmt: skip
        if rows:
            head = ("", "count", "mean", *_PERCENTILES, "max")
            yield f"<h3>{escape(title)}</h3>{_table(head, rows, 'even')}"


def _with_interval(spread: Mapping[str, Any], name: str) -> str:
    interval = (spread.get("ci") or {}).get(name)
    value = percentile(spread, name)
    if not interval or value == MISSING:
        return value
    low, high = map(seconds, interval)
    return f"{value} <small>[{low}, {high}]</small>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table; cells are HTML."""
    names = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(
        f"<tr><th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    table = f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="wide"><table class="{kind}">{table}</table></div>'


def _plots(plots: Sequence[Plot]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(each.title)}</figcaption>{each.svg}</figure>"
        for each in plots
    )
    return f'<div class="plots">{figures}</div>'


def _of_the_run(result: Mapping[str, Any]) -> str:
    groups = {
        "Workload": result["workload"],
        "Load": result["load"],
        "Target": result["target"],
        "Machine": result["machine"],
        "Reused prompt tokens of misses": result["prompt_tokens_reused"],
        "Errors": result["errors"],
    }
    return '<div class="facts">' + "".join(
        f"<div><h3>{name}</h3><dl>{_facts(values)}</dl></div>"
        for name, values in groups.items()
        if values
    ) + "</div>"  # fmt: skip


def _facts(values: Mapping[str, Any]) -> str:
    return "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_fact(value))}</dd>"
        for name, value in values.items()
        if value is not None
    )


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value < 1000 else three_digits(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
