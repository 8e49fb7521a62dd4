"""Plots of simulations: hit ratios over time, or against the memory tier's size."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.simulation.recommend import SizeRecommendation
from server.simulation.simulate import Replay
from server.simulation.traces import Trace

_WINDOWS = 100


def draw(file: Path, plots: Sequence[tuple[Trace, Replay, SizeRecommendation | None]]) -> None:
    """Draw a plot for each trace: against size where sizes were tried, or else over time.

    Raises:
        OSError: the file can't be written.
    """
    figure = Figure(figsize=(8, 3.2 * len(plots)), layout="constrained")
    rows = figure.subplots(len(plots), squeeze=False)
    for (axes,), (trace, replay, found) in zip(rows, plots, strict=True):
        axes.set_title(trace.name)
        axes.set_ylabel("hit ratio")
        if found is None:
            _over_time(axes, trace, replay)
        else:
            _against_size(axes, found)
        axes.set_ylim(0, 1)
    figure.savefig(file)


def _over_time(axes: Axes, trace: Trace, replay: Replay) -> None:
    count = len(trace.requests)
    ends = sorted({count * number // _WINDOWS for number in range(1, _WINDOWS + 1)} - {0})
    windows = list(zip([0, *ends], ends, strict=False))
    started_at = trace.requests[0].at_s
    has_times = trace.requests[-1].at_s > started_at
    axes.set_xlabel("seconds" if has_times else "requests")
    moments = [trace.requests[end - 1].at_s - started_at if has_times else end for end in ends]
    names = [tier.name for tier in replay.result.tiers]
    shares = [
        [replay.answered_by[start:end].count(tier) / (end - start) for start, end in windows]
        for tier in range(len(names))
    ]
    axes.stackplot(moments, shares, labels=names)
    axes.legend(loc="upper left")


def _against_size(axes: Axes, found: SizeRecommendation) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of the memory tier")
    sizes = [point.max_bytes for point in found.curve]
    axes.plot(sizes, [point.hit_ratio for point in found.curve], marker="o")
    axes.axvline(found.max_bytes, linestyle="--", label="recommended")
    axes.legend(loc="upper left")
