"""Tables of text, and sizes as people read them."""

from collections.abc import Sequence

from pydantic import ByteSize


def size(count: int) -> str:
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
