"""The command `tierserve`."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from server.config import Config, ConfigError, load


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status (2 where the configuration is wrong)."""
    parser = argparse.ArgumentParser(prog="tierserve", description="A multi-tier LLM server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("serve", "serve until SIGTERM"),
        ("check", "print the effective configuration, or every mistake in it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, metavar="FILE")
    commands.add_parser("version", help="print the version")
    options = parser.parse_args(arguments)
    if options.command == "version":
        print(version("tierserve"))
        return 0
    try:
        config = load(options.config)
        if options.command == "check":
            print(_as_yaml(config), end="")
            return 0
        from server.app import serve

        return serve(config)
    except ConfigError as exc:
        print(*exc.mistakes, sep="\n", file=sys.stderr)
        return 2


def _as_yaml(config: Config) -> str:
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


if __name__ == "__main__":
    sys.exit(main())
