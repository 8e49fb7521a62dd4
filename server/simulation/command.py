"""The command `tierserve simulate`."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from server.config.base import ConfigError
from server.config.schema import Config
from server.simulation.report import as_json, as_text, notes, report
from server.simulation.simulate import limit
from server.simulation.traces import TraceError, read
from server.terminal import progress


def simulate_traces(config: Config, options: argparse.Namespace) -> None:
    """Replay traces against the tiers that `config` describes, and print what they do.

    Raises:
        ConfigError: a trace can't be read, or a plot can't be drawn.
    """
    if options.plot is not None:
        _check_plot(options.plot)
    try:
        traces = [read(file) for file in options.traces]
    except TraceError as exc:
        raise ConfigError([str(exc)]) from exc
    configs = [limit(config, trace, options.memory, options.disk, _warn) for trace in traces]
    reports, plots = [], []
    for trace, limited in zip(traces, configs, strict=True):
        result, replay = report(limited, trace, progress, recommends=options.recommend)
        reports.append(result)
        plots.append((trace, replay, result.recommendation))
        if not options.json:
            print(as_text(result), flush=True)
    missing = notes(configs[0])
    if options.json:
        print(as_json(reports, missing))
    elif missing:
        print(*missing, sep="\n")
    if options.plot is not None:
        # Imported here, since it needs an extra.
        from server.simulation.plot import draw

        try:
            draw(options.plot, plots)
        except OSError as exc:
            should = f"should be a file that we can write, not {options.plot}"
            raise ConfigError([f"--plot: {should}: {exc.strerror or exc}"]) from exc


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _check_plot(file: Path) -> None:
    """Raise what is wrong with a plot before the long replay, not after it."""
    if file.suffix not in {".png", ".svg"}:
        raise ConfigError([f"--plot: should end in .png or .svg, not {str(file)!r}"])
    if find_spec("matplotlib") is None:
        raise ConfigError(["--plot: matplotlib isn't installed; it is in the extra simulate"])
