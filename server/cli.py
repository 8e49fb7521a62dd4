"""The command `tierserve`."""

import argparse
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from server.admin.arguments import add_cache_command
from server.config.base import ConfigError
from server.config.load import load, redact
from server.config.schema import Config
from server.process import become_child_of_init, ignore_signals, open_standard_streams
from server.simulation.commands import add_simulate_command
from server.simulation.commands import run as simulate

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
    add_simulate_command(commands)
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
        return simulate(config, options)
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


def _as_yaml(config: Config) -> str:
    shown = redact(config.model_dump(mode="json"))
    text: str = yaml.safe_dump(shown, sort_keys=False)
    return text


if __name__ == "__main__":
    sys.exit(main())
