"""The command `tierserve simulate`.

The rest of the package is imported only when the command runs.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from server.config.base import ConfigError
from server.config.schema import Config


def add_simulate_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    text = "replay traces of requests against the tiers, and print what they would do"
    more = "; of traces with prompts, also what an engine's cache and the prefix tier would reuse"
    command = commands.add_parser("simulate", help=text, description=text + more)
    command.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="CSV or JSONL")
    command.add_argument(
        "--config", type=Path, default=Path(os.devnull), metavar="FILE", help="describes the tiers"
    )
    for tier in ("memory", "disk"):
        text = f"another limit of the {tier} tier: 64MiB, 10%% of the trace's footprint, or none"
        command.add_argument(f"--{tier}", metavar="SIZE|P%", help=text)
    _add_prefix_options(command)
    text = "print the sizes beyond which more memory, and more of the prefix tier, gain little"
    command.add_argument("--recommend", action="store_true", help=text)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    text = "plot hit ratios over time or, with --recommend, against size"
    command.add_argument("--plot", type=Path, metavar="FILE.png|svg", help=text)


def _add_prefix_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "prompts (Mooncake's traces, and a log.trace)",
        "sizes and rates are by default those of the embedded model on two cores; give yours",
    )
    text = "another limit of the prefix tier: 4GiB, 10%% of all different blocks, or none"
    group.add_argument("--prefix", metavar="SIZE|P%", help=text)
    text = "tokens that the engine's own cache holds, or 10%% of all different ones (default 10%%)"
    group.add_argument("--engine-tokens", default="10%", metavar="N|P%", help=text)
    text = "of a token's keys and values (default 46080)"
    group.add_argument("--bytes-per-token", type=int, default=46080, metavar="N", help=text)
    text = "tokens of prompts that the engine computes in a second (default 230)"
    group.add_argument("--compute-tokens-per-s", type=float, default=230, metavar="N", help=text)
    text = "tokens that the prefix tier loads in a second (default 100000)"
    group.add_argument("--load-tokens-per-s", type=float, default=1e5, metavar="N", help=text)


def run(config: Config, options: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigError: an argument is wrong.
    """
    from server.simulation.prefix_report import PromptOptions
    from server.simulation.report import as_json, as_text, build_report, list_omissions
    from server.simulation.simulate import with_limits
    from server.simulation.traces import TraceError, read
    from server.terminal import progress

    if options.plot is not None:
        _check_plot(options.plot)
    _check_positive(options, "bytes_per_token", "compute_tokens_per_s", "load_tokens_per_s")
    prefix = PromptOptions(
        options.engine_tokens, options.prefix, options.bytes_per_token,
        options.compute_tokens_per_s, options.load_tokens_per_s,
    )  # fmt: skip
    try:
        traces = [read(file) for file in options.traces]
    except TraceError as exc:
        raise ConfigError([str(exc)]) from exc
    configs = [with_limits(config, trace, options.memory, options.disk, _warn) for trace in traces]
    reports, plots = [], []
    for trace, limited in zip(traces, configs, strict=True):
        found = build_report(
            limited, trace, progress, options=prefix, recommends=options.recommend, warn=_warn
        )
        reports.append(found.report)
        plots.append((trace, found))
        if not options.json:
            print(as_text(found.report), flush=True)
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


def _check_positive(options: argparse.Namespace, *names: str) -> None:
    mistakes = [
        f"--{name.replace('_', '-')}: should be a positive number, not {value}"
        for name in names
        if not (isfinite(value := getattr(options, name)) and value > 0)
    ]
    if mistakes:
        raise ConfigError(mistakes)


def _check_plot(file: Path) -> None:
    """Raise a wrong --plot before the long replay, not after it."""
    if file.suffix not in {".png", ".svg"}:
        raise ConfigError([f"--plot: should end in .png or .svg, not {str(file)!r}"])
    if find_spec("matplotlib") is None:
        raise ConfigError(["--plot: needs matplotlib: install tierserve[simulate]"])
