"""Tables of text, and sizes as people read them."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TypeVar

from pydantic import ByteSize


def human_size(count: int) -> str:
    """Return a size in bytes as people read it."""
    return ByteSize(count).human_readable()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines in which columns stand below each other, the first to the left."""
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
    """Pass requests on and show how far it is, unless all is over in a moment.

    `total` is how many there are, where they don't know it.
    """
    if find_spec("tqdm") is None:
        return requests
    from tqdm import tqdm

    bar: Iterable[_Request] = tqdm(
        requests, desc=name, total=total, unit=" requests", delay=1, disable=None, leave=False
    )
    return bar
