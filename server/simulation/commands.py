"""The command `tierserve simulate`.

The rest of the package is imported only when the command runs.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from server.config.base import ConfigError
from server.config.schema import Config


def add_simulate_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    text = "replay traces of keys and sizes against the tiers, and print what they would do"
    command = commands.add_parser("simulate", help=text, description=text)
    command.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="CSV or JSONL")
    command.add_argument(
        "--config", type=Path, default=Path(os.devnull), metavar="FILE", help="describes the tiers"
    )
    for tier in ("memory", "disk"):
        text = f"another limit of the {tier} tier: 64MiB, 10%% of the trace's footprint, or none"
        command.add_argument(f"--{tier}", metavar="SIZE|P%", help=text)
    text = "print the size beyond which more memory gains little"
    command.add_argument("--recommend", action="store_true", help=text)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    text = "plot hit ratios over time or, with --recommend, against size"
    command.add_argument("--plot", type=Path, metavar="FILE.png|svg", help=text)


def run(config: Config, options: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigError: an argument is wrong.
    """
    from server.simulation.report import as_json, as_text, build_report, list_omissions
    from server.simulation.simulate import with_limits
    from server.simulation.traces import TraceError, read
    from server.terminal import progress

    if options.plot is not None:
        _check_plot(options.plot)
    try:
        traces = [read(file) for file in options.traces]
    except TraceError as exc:
        raise ConfigError([str(exc)]) from exc
    configs = [with_limits(config, trace, options.memory, options.disk, _warn) for trace in traces]
    reports, plots = [], []
    for trace, limited in zip(traces, configs, strict=True):
        report, replay = build_report(limited, trace, progress, recommends=options.recommend)
        reports.append(report)
        plots.append((trace, replay, report.recommendation))
        if not options.json:
            print(as_text(report), flush=True)
    omissions = list_omissions(configs[0])
    if options.json:
        print(as_json(reports, omissions))
    elif omissions:
        print(*omissions, sep="\n")
    if options.plot is not None:
        from server.simulation.plot import draw

        try:
            draw(options.plot, plots)
        except OSError as exc:
            should = f"should be a writable path, not {options.plot}"
            raise ConfigError([f"--plot: {should}: {exc.strerror or exc}"]) from exc
    return 0


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _check_plot(file: Path) -> None:
    """Raise a wrong --plot before the long replay, not after it."""
    if file.suffix not in {".png", ".svg"}:
        raise ConfigError([f"--plot: should end in .png or .svg, not {str(file)!r}"])
    if find_spec("matplotlib") is None:
        raise ConfigError(["--plot: matplotlib isn't installed; it is in the extra simulate"])
