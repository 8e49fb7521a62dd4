"""Rows of README's table: each benchmark ends with its own, and `all.py` collects them."""

import sys
from pathlib import Path

HEAD = "| what | result | measured by |\n|---|---|---|"
_MARK = " | `scripts/bench/"


def print_row(what: str, result: str) -> None:
    """Print a row, with the name of the script that runs."""
    print(f"| {what} | {result}{_MARK}{Path(sys.argv[0]).name}` |", flush=True)


def is_row(line: str) -> bool:
    """Return whether a line was printed by `print_row`."""
    return _MARK in line
