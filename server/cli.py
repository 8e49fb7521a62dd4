"""The command `tierserve`."""

import argparse
import os
import signal
import sys
from pathlib import Path

import orjson
import yaml

from server.admin.arguments import add_cache_command
from server.config.base import VERSION, ConfigError
from server.config.load import load, redact
from server.process import become_child_of_init, ignore_signals, open_standard_streams
from server.simulation.commands import add_simulate_command
from server.simulation.commands import run as simulate

# The statuses that shells give a program that SIGPIPE or SIGINT has ended.
_PIPE_CLOSED = 128 + signal.SIGPIPE
_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status (2 where the configuration is wrong)."""
    open_standard_streams()
    options = _parser().parse_args(arguments)
    if options.command == "serve":
        become_child_of_init()
        ignore_signals()
    try:
        status = _run(options)
        sys.stdout.flush()
    except ConfigError as exc:
        print(*exc.mistakes, sep="\n", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has closed the pipe; flushing the rest at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    text = "An LLM inference server: vLLM behind a memory, a disk and a shared cache tier."
    parser = argparse.ArgumentParser(prog="tierserve", description=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "serve until SIGTERM"),
        ("check", "print the configuration in effect, or every mistake in it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, metavar="FILE")
    text = "print every field of a configuration with its default, as YAML with comments"
    command = commands.add_parser("config", help=text, description=text)
    command.add_argument("--schema", action="store_true", help="print the JSON Schema instead")
    _add_keys(commands)
    add_cache_command(commands)
    add_simulate_command(commands)
    commands.add_parser("version", help="print the version")
    return parser


def _add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "make a key for a tenant"
    actions = commands.add_parser("keys", help=text, description=text).add_subparsers(
        dest="action", required=True
    )
    text = "print a new key, which is shown only once, and its lines for tenants.file"
    actions.add_parser("new", help=text, description=text).add_argument("tenant", metavar="TENANT")


def _run(options: argparse.Namespace) -> int:
    # Commands are imported where they run, since their imports take most of a command's time.
    match options.command:
        case "version":
            print(VERSION)
        case "config":
            _print_reference(as_schema=options.schema)
        case "keys":
            _print_key(options.tenant)
        case "check":
            _print_checked(options.config)
        case "simulate":
            return simulate(load(options.config), options)
        case "cache":
            from server.admin.commands import run

            return run(load(options.config), options)
        case _:
            from server.app import serve
            from server.check import load_checked

            return serve(load_checked(options.config))
    return 0


def _print_reference(*, as_schema: bool) -> None:
    from server.config.reference import json_schema, reference

    if as_schema:
        print(orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2).decode())
    else:
        print(reference(), end="")


def _print_key(tenant: str) -> None:
    from server.config.secrets import hash_key, new_key
    from server.protocol.labels import label_problem

    if (should := label_problem("tenant", tenant)) is not None:
        raise ConfigError([f"TENANT: should be {should}, not {tenant!r}"])
    key = new_key()
    # To standard error, so that standard output can be appended to the file.
    print(f"The tenant's key, which nothing shows again: {key}", file=sys.stderr)
    print(yaml.safe_dump({tenant: {"keys": [hash_key(key)]}}), end="")


def _print_checked(file: Path) -> None:
    from server.check import choices, load_checked

    config = load_checked(file)
    print(yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False), end="")
    for choice in choices(config):
        print(f"# {choice}")


if __name__ == "__main__":
    sys.exit(main())
