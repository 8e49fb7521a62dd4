"""Fields of rows of CSV and JSON, as what they should be."""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

Row = Mapping[str, Any]
_MOST = 10_000_000
"""Of tokens and characters: a prompt of more is a mistake, and would fill the memory."""


def text_of(row: Row, name: str) -> str:
    """Return a text that isn't empty.

    Raises:
        ValueError: it is missing or something else, as for all functions here.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} should be a text{_not(row, name)}")
    return value


def count_of(row: Row, name: str) -> int:
    """Return a whole number from 0 to ten million."""
    value = row.get(name)
    if isinstance(value, str) and _is_number(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} should be a whole number{_not(row, name)}")
    if value > _MOST:
        raise ValueError(f"{name} should be at most {_MOST:,}{_not(row, name)}")
    return value


_is_number = re.compile(r"[0-9]{1,18}").fullmatch


def seconds_of(row: Row, name: str) -> float:
    """Return a number from 0."""
    value = row.get(name)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = -1
        if isfinite(number) and number >= 0:
            return number
    raise ValueError(f"{name} should be a number from 0{_not(row, name)}")


def list_of(row: Row, name: str) -> list[Any]:
    """Return a list."""
    value = row.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} should be a list{_not(row, name)}")
    return value


def _not(row: Row, name: str) -> str:
    if name not in row:
        return ", but is missing"
    value = row[name]
    return f", not {value!r}" if isinstance(value, str | int | float | None) else ""
