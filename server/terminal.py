"""Text for a terminal: tables, readable sizes and durations, and a progress bar."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TypeVar

from pydantic import ByteSize


def human_size(count: int) -> str:
    """Return a number of bytes with a unit, such as `1.5MiB`."""
    return ByteSize(count).human_readable()


def duration(seconds: float) -> str:
    """Return a duration with a unit, such as `1.5 h`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


_Request = TypeVar("_Request")


def progress(
    requests: Iterable[_Request], name: str, *, total: int | None = None
) -> Iterable[_Request]:
    """Return the requests, with a progress bar where they take longer than a second.

    Args:
        requests: what is processed; without tqdm, they are returned as they are.
        name: stands before the bar.
        total: how many requests there are, where `requests` has no length.
    """
    if find_spec("tqdm") is None:
        return requests
    from tqdm import tqdm

    bar: Iterable[_Request] = tqdm(
        requests, desc=name, total=total, unit=" requests", delay=1, disable=None, leave=False
    )
    return bar
