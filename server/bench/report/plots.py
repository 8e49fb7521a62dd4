"""Plots of a run as inline SVG: over time and as distributions, each outcome in its colour.

Text and lines take their colours from the page (`currentColor`, custom properties), so that one
plot does in light, in dark and on paper.
"""

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from server.bench.records import Failure, Floats, Records
from server.bench.report.units import in_order, seconds

COLOURS = {
    "memory": "#2c9f62", "disk": "#3b82d6", "shared": "#8d63d2", "hit": "#2c9f62",
    "stale": "#b8901c", "collapsed": "#17a2a8", "miss": "#e27233", "uncached": "#e27233",
    "request": "#cf5a9b", "revalidated": "#96692f", "failed": "#d43d3d",
}  # fmt: skip
OTHER = "#7d8590"
"""Of outcomes that are named by other servers."""
_INK, _GRID = "#010203", "#010204"
"""Stand for the page's colours until the SVG is written."""
_WINDOWS = 120
_POINTS, _MANY = 4000, 1000
_STEPS = 400
_MOMENTS = 600
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "tierserve", "font.size": 10, "text.color": _INK,
    "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0, "legend.frameon": False,
}  # fmt: skip


class Plot(NamedTuple):
    """A plot with its title, which the page sets in its own type."""

    title: str
    svg: str


def draw(records: Records, began: float, *, is_open: bool) -> list[Plot]:
    """Return the plots; none where nothing ended.

    Args:
        records: of a run.
        began: CLOCK_MONOTONIC at which the schedule began.
        is_open: whether requests were due at times of a schedule.
    """
    asked = records.where(~records.probe)
    ended = asked.where(asked.failure != Failure.INTERRUPTED)
    if not len(ended):
        return []
    whole = ended.where(ended.failure == Failure.NONE)
    of, end = "Distribution: ", whole.end
    drawings: list[tuple[str, Callable[[Axes], None]]] = [
        ("Answers by outcome", lambda axes: _throughput(axes, ended, began))
    ]
    if len(whole):
        drawings += [
            ("Each answer's time from sending", lambda axes: _latency(axes, whole, began)),
            (f"{of}first token, from sending",
             lambda axes: _distribution(axes, whole, whole.first_token - whole.sent)),
            (f"{of}whole answer, from sending",
             lambda axes: _distribution(axes, whole, end - whole.sent)),
        ]  # fmt: skip
    if len(whole) and is_open:
        drawings.append(
            (f"{of}whole answer, from when it was due",
             lambda axes: _distribution(axes, whole, end - whole.due))
        )  # fmt: skip
    drawings.append(
        ("Requests that were due and have no end yet", lambda axes: _waiting(axes, asked, began))
    )
    with mpl.rc_context(_STYLE):
        return [Plot(title, _svg(draw_on)) for title, draw_on in drawings]


def colour(outcome: str) -> str:
    """Return the colour of an outcome."""
    return COLOURS.get(outcome, OTHER)


def _svg(draw_on: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=(7.2, 3.1), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    draw_on(axes)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    # Several plots are in one page: elements that nothing refers to need no id.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _of(records: Records) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return the outcomes that were seen, in order, and which rows have them."""
    seen = np.unique(records.outcome)
    by_name = {records.outcomes[number]: records.outcome == number for number in seen}
    return [(name, by_name[name]) for name in in_order(by_name)]


def _throughput(axes: Axes, records: Records, began: float) -> None:
    times = records.end - began
    edges = np.linspace(0, max(float(times.max()), 1e-3), _windows(len(times)) + 1)
    names, rates = [], []
    for name, rows in _of(records):
        names.append(name)
        rates.append(np.histogram(times[rows], edges)[0] / np.diff(edges))
    middles = (edges[:-1] + edges[1:]) / 2
    axes.stackplot(middles, rates, labels=names, colors=list(map(colour, names)), alpha=0.85)
    _over_time(axes, "answers/s", edges[-1])
    axes.set_ylim(bottom=0)
    _legend(axes, len(names))


def _latency(axes: Axes, records: Records, began: float) -> None:
    chosen = np.linspace(0, len(records) - 1, min(len(records), _POINTS)).astype(int)
    times, taken = records.end - began, np.maximum(records.end - records.sent, 1e-6)
    drawn = np.zeros(len(records), bool)
    drawn[chosen] = True
    size = 5 if len(records) > _MANY else 16
    of = _of(records)
    for name, rows in of:
        at = rows & drawn
        axes.scatter(times[at], taken[at], s=size, alpha=0.55, linewidths=0, color=colour(name),
                     label=name, rasterized=True)  # fmt: skip
    _seconds_axis(axes, "y")
    _over_time(axes, "", float(times.max()))
    _legend(axes, len(of))


def _distribution(axes: Axes, records: Records, times: Floats) -> None:
    of = _of(records)
    for name, rows in of:
        taken = np.maximum(np.sort(times[rows]), 1e-6)
        taken = taken[~np.isnan(taken)]
        if not len(taken):
            continue
        shares = np.arange(1, len(taken) + 1) / len(taken)
        kept = np.unique(np.linspace(0, len(taken) - 1, min(len(taken), _STEPS)).astype(int))
        axes.step(taken[kept], shares[kept], where="post", color=colour(name), label=name, lw=1.8)
    _seconds_axis(axes, "x")
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    _legend(axes, len(of))


def _waiting(axes: Axes, records: Records, began: float) -> None:
    due, ended = (np.sort(each[~np.isnan(each)]) - began for each in (records.due, records.end))
    span = max(float(np.concatenate((due, ended)).max()), 1e-3)
    moments = np.linspace(0, span, _MOMENTS)
    waiting = np.searchsorted(due, moments, "right") - np.searchsorted(ended, moments, "right")
    axes.fill_between(moments, waiting, step="post", color=OTHER, alpha=0.5, linewidth=0)
    _over_time(axes, "requests", span)
    axes.set_ylim(bottom=0)


def _over_time(axes: Axes, label: str, until: float) -> None:
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel(label)
    axes.set_xlim(0, until)


def _seconds_axis(axes: Axes, name: str) -> None:
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _tick(value: float) -> str:
    number, unit = seconds(value).split(" ")
    return f"{float(number.replace(',', '')):g} {unit}"


def _legend(axes: Axes, count: int) -> None:
    legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=max(count, 1),
                         borderpad=0.1, fontsize=9, handlelength=0.9, columnspacing=1.2,
                         markerscale=2.5)  # fmt: skip
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _windows(count: int) -> int:
    return int(min(_WINDOWS, max(10, count // 20)))
