"""Plots of simulations: hit ratios over time, or against a tier's size."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.simulation.prefix_report import PrefixRecommendation, PrefixReplay, PrefixReuse
from server.simulation.recommend import SizeRecommendation
from server.simulation.report import Simulation
from server.simulation.simulate import Replay
from server.simulation.traces import Trace

_WINDOWS = 100
_Drawing = tuple[str, str, Callable[[Axes], None]]
"""Title, label of the ratio, and what draws it."""


def draw(file: Path, plots: Sequence[tuple[Trace, Simulation]]) -> None:
    """Draw the tiers of each trace, and its prompts: over time, or against size if that was tried.

    Raises:
        OSError: the file can't be written.
    """
    drawings = [each for trace, found in plots for each in _drawings(trace, found)]
    figure = Figure(figsize=(8, 3.2 * len(drawings)), layout="constrained")
    rows = figure.subplots(len(drawings), squeeze=False)
    for (axes,), (title, label, draw_on) in zip(rows, drawings, strict=True):
        axes.set_title(title)
        axes.set_ylabel(label)
        draw_on(axes)
        axes.set_ylim(0, 1)
    figure.savefig(file)


def _drawings(trace: Trace, found: Simulation) -> Iterator[_Drawing]:
    if (recommended := found.report.recommendation) is not None:
        yield trace.name, "hit ratio", lambda axes: _against_size(axes, recommended)
    elif trace.requests:
        yield trace.name, "hit ratio", lambda axes: _over_time(axes, trace, found.replay)
    if (prefixes := found.prefixes) is not None:
        title, label = f"{trace.name}: prompts", "reused tokens"
        sizes = prefixes.report.recommendation
        if sizes is not None:
            yield title, label, lambda axes: _prefixes_by_size(axes, prefixes.report, sizes)
        else:
            yield title, label, lambda axes: _prefixes_over_time(axes, prefixes)


def _over_time(axes: Axes, trace: Trace, replay: Replay) -> None:
    windows = _windows(axes, [request.at_s for request in trace.requests])
    names = [tier.name for tier in replay.result.tiers]
    shares = [
        [replay.answered_by[start:end].count(tier) / (end - start) for _, start, end in windows]
        for tier in range(len(names))
    ]
    axes.stackplot([moment for moment, _, _ in windows], shares, labels=names)
    axes.legend(loc="upper left")


def _against_size(axes: Axes, found: SizeRecommendation) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of the memory tier")
    sizes = [point.max_bytes for point in found.curve]
    axes.plot(sizes, [point.hit_ratio for point in found.curve], marker="o")
    axes.axvline(found.max_bytes, linestyle="--", label="recommended")
    axes.legend(loc="upper left")


def _prefixes_over_time(axes: Axes, found: PrefixReplay) -> None:
    windows = _windows(axes, [prompt.at_s for prompt, _ in found.requests])
    tokens = [prompt.tokens for prompt, _ in found.requests]
    reused = {"engine": [computed for _, computed in found.requests], "prefix tier": found.loaded}
    shares = [
        [
            sum(blocks[start:end]) * found.report.block_tokens / sum(tokens[start:end])
            for _, start, end in windows
        ]
        for blocks in reused.values()
    ]
    axes.stackplot([moment for moment, _, _ in windows], shares, labels=list(reused))
    axes.legend(loc="upper left")


def _prefixes_by_size(axes: Axes, report: PrefixReuse, found: PrefixRecommendation) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of the prefix tier")
    sizes = [point.max_bytes for point in found.curve]
    engine = report.engine_ratio
    axes.plot(sizes, [engine + point.ratio for point in found.curve], marker="o", label="ours")
    most = [engine + point.optimum_tokens / report.tokens for point in found.curve]
    axes.plot(sizes, most, linestyle=":", label="optimum")
    axes.axhline(engine, linestyle="-.", label="the engine's cache alone")
    axes.axvline(found.max_bytes, linestyle="--", label="recommended")
    axes.legend(loc="upper left")


def _windows(axes: Axes, times: Sequence[float]) -> list[tuple[float, int, int]]:
    """Return parts of the requests as moment, start and end, and label the axis of moments."""
    count = len(times)
    ends = sorted({count * number // _WINDOWS for number in range(1, _WINDOWS + 1)} - {0})
    has_times = times[-1] > times[0]
    axes.set_xlabel("seconds" if has_times else "requests")
    moments = [times[end - 1] - times[0] if has_times else float(end) for end in ends]
    return list(zip(moments, [0, *ends], ends, strict=False))
