"""The command `tierserve`."""

import argparse
import os
import signal
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import yaml

from server.admin.arguments import add_cache_command
from server.config.base import ConfigError
from server.config.load import load, redact
from server.config.schema import Config
from server.process import become_child_of_init, ignore_signals, open_standard_streams

# As shells report of a program that SIGPIPE has ended.
_PIPE_CLOSED = 128 + signal.SIGPIPE
_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status (2 where the configuration is wrong)."""
    open_standard_streams()
    parser = argparse.ArgumentParser(prog="tierserve", description="A multi-tier LLM server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("serve", "serve until SIGTERM"),
        ("check", "print the effective configuration, or every mistake in it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, metavar="FILE")
    _add_simulate(commands)
    add_cache_command(commands)
    commands.add_parser("version", help="print the version")
    _add_keys(commands)
    options = parser.parse_args(arguments)
    if options.command == "version":
        print(version("tierserve"))
        return 0
    if options.command == "serve":
        become_child_of_init()
        ignore_signals()
    try:
        if options.command == "keys":
            _print_key(options.tenant)
            return 0
        status = _run(_read(options), options)
        sys.stdout.flush()
    except ConfigError as exc:
        print(*exc.mistakes, sep="\n", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read has had enough; what is still buffered mustn't fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _read(options: argparse.Namespace) -> Config:
    if options.command not in ("check", "serve"):
        return load(options.config)
    # Imported where they are needed, since they take the better part of a command's time.
    from server.check import load_checked

    return load_checked(options.config)


def _run(config: Config, options: argparse.Namespace) -> int:
    if options.command == "check":
        print(_as_yaml(config), end="")
        return 0
    if options.command == "simulate":
        return _simulate(config, options)
    if options.command == "cache":
        from server.admin.commands import run

        return run(config, options)
    from server.app import serve

    return serve(config)


def _add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "make a key for a tenant"
    actions = commands.add_parser("keys", help=text, description=text).add_subparsers(
        dest="action", required=True
    )
    text = "print a new key, this once, and its hash as tenants.file wants it"
    actions.add_parser("new", help=text, description=text).add_argument("tenant", metavar="TENANT")


def _print_key(tenant: str) -> None:
    from server.config.secrets import hash_key, new_key
    from server.protocol.labels import label_problem

    if (should := label_problem("tenant", tenant)) is not None:
        raise ConfigError([f"TENANT: should be {should}, not {tenant!r}"])
    key = new_key()
    # Apart from the lines for the file, so that these can be appended to it.
    print(f"The tenant's key, which nothing shows again: {key}", file=sys.stderr)
    print(yaml.safe_dump({tenant: {"keys": [hash_key(key)]}}), end="")


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "replay traces of keys and sizes against the tiers, and say what they would do"
    command = commands.add_parser("simulate", help=text, description=text)
    command.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="CSV or JSONL")
    command.add_argument(
        "--config", type=Path, default=Path(os.devnull), metavar="FILE", help="describes the tiers"
    )
    for tier in ("memory", "disk"):
        text = "another limit of that tier: 64MiB, 10%% of the trace's footprint, or none"
        command.add_argument(f"--{tier}", metavar="SIZE|P%", help=text)
    command.add_argument("--recommend", action="store_true", help="say which size is enough")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    text = "plot hit ratios over time or, with --recommend, against size"
    command.add_argument("--plot", type=Path, metavar="FILE.png|svg", help=text)


def _simulate(config: Config, options: argparse.Namespace) -> int:
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
    configs = [with_limits(config, trace, options.memory, options.disk, _say) for trace in traces]
    reports, plots = [], []
    for trace, limited in zip(traces, configs, strict=True):
        told, replay = build_report(limited, trace, progress, recommends=options.recommend)
        reports.append(told)
        plots.append((trace, replay, told.recommendation))
        if not options.json:
            print(as_text(told), flush=True)
    missing = list_omissions(configs[0])
    if options.json:
        print(as_json(reports, missing))
    elif missing:
        print(*missing, sep="\n")
    if options.plot is not None:
        from server.simulation.plot import draw

        try:
            draw(options.plot, plots)
        except OSError as exc:
            should = f"should be a file that we can write, not {options.plot}"
            raise ConfigError([f"--plot: {should}: {exc.strerror or exc}"]) from exc
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _check_plot(file: Path) -> None:
    """Raise what is wrong with a plot before the long replay, not after it."""
    if file.suffix not in {".png", ".svg"}:
        raise ConfigError([f"--plot: should end in .png or .svg, not {str(file)!r}"])
    if find_spec("matplotlib") is None:
        raise ConfigError(["--plot: matplotlib isn't installed; it is in the extra simulate"])


def _as_yaml(config: Config) -> str:
    shown = redact(config.model_dump(mode="json"))
    text: str = yaml.safe_dump(shown, sort_keys=False)
    return text


if __name__ == "__main__":
    sys.exit(main())
