"""Measured values as text, in units that people read."""

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"
_ORDER = ("memory", "disk", "shared", "hit", "stale", "collapsed", "miss", "uncached", "failed")
_MICRO = (1e6, "µs")


def in_order(outcomes: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return names of outcomes: nearest tier first, then what an engine did, then failures."""
    known = {name: at for at, name in enumerate(_ORDER)}
    return sorted(outcomes, key=lambda name: (known.get(name, len(known) - 1.5), name))


def seconds(value: float | None) -> str:
    """Return a time with its unit and three digits: `340 µs`, `1.52 ms`, `2.04 s`."""
    if value is None:
        return MISSING
    if value == 0:
        return "0 s"
    factor, unit = (1.0, "s") if abs(value) >= 1 else (1e3, "ms") if abs(value) >= 1e-3 else _MICRO
    return f"{three_digits(value * factor)} {unit}"


def three_digits(value: float) -> str:
    """Return a number with three digits, or all of those before the point."""
    size = abs(value)
    if size == 0:
        return "0"
    decimals = sum(size < bound for bound in (99.95, 9.995, 0.9995))
    return f"{value:,.{decimals}f}"


def share(part: float, of: float) -> str:
    """Return a share in percent."""
    return f"{part / of:.1%}" if of else MISSING


def percentile(spread: Mapping[str, Any] | None, name: str) -> str:
    """Return a percentile of a `DIST` as time; `*` where too few samples are beyond it."""
    if not spread or spread.get(name) is None:
        return MISSING
    return seconds(spread[name]) + "*" * (name in spread.get("too_few", ()))


def rate(value: float | None) -> str:
    """Return a number a second."""
    return MISSING if value is None else three_digits(value)
