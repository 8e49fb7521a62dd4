"""The command `tierserve`."""

import argparse
import os
import signal
import sys
from pathlib import Path

import orjson
import yaml

from server.admin.arguments import add_cache_command
from server.audit.commands import add_audit_command
from server.audit.commands import run as audit
from server.bench.arguments import add_bench_command
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
    text = "write a configuration for this machine, with comments"
    command = commands.add_parser("init", help=text, description=text)
    text = "the file to write, which must not be there yet; by default tierserve.yaml"
    command.add_argument(
        "file", type=Path, nargs="?", default=Path("tierserve.yaml"), metavar="FILE", help=text
    )
    text = "print every field of a configuration with its default, as YAML with comments"
    command = commands.add_parser("config", help=text, description=text)
    command.add_argument("--schema", action="store_true", help="print the JSON Schema instead")
    _add_keys(commands)
    add_cache_command(commands)
    add_audit_command(commands)
    add_simulate_command(commands)
    add_bench_command(commands)
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
        case "init":
            _write_initial(options.file)
        case "check":
            _print_checked(options.config)
        case "simulate":
            return simulate(load(options.config), options)
        case "audit":
            return audit(options)
        case "bench":
            from server.bench.commands import run as bench

            return bench(options)
        case "cache":
            from server.admin.commands import run

            return run(load(options.config), options)
        case _:
            return _serve(options.config)
    return 0


def _serve(file: Path) -> int:
    from server.check import load_checked
    from server.engine.threads import worker_count
    from server.preparation.embedded_model import prepare
    from server.web.inherited_sockets import take_inherited_sockets

    inherited = take_inherited_sockets()
    config = load_checked(file, listens=not inherited.front)
    if inherited.admin and config.admin.key is None:
        raise ConfigError(["admin.key: should be set, as the socket named admin is inherited"])
    prepare(config)
    if (workers := worker_count(config)) > 1:
        from server.workers.master import serve_with_workers

        return serve_with_workers(config, file, workers, inherited)
    from server.app import serve

    return serve(config, file, inherited)


def _write_initial(file: Path) -> None:
    from server.preparation.initial import write

    for line in write(file):
        print(line)


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
