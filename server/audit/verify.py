"""Whether the files of an audit log are one whole chain: no line changed, removed, moved or added.

A line that is sealed with our key is whole in itself, and follows the one before if it has the next
number and that one's seal. Beside the newest file is a copy of the last line, which tells of lines
that were cut off the end.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from server.audit.chain import BEGINNING, MAX_LINE_BYTES, ChainLink, read_line
from server.audit.log import copy_of_last

MAX_PROBLEMS = 1000
"""How many problems are told."""
# The name of an older file, as `rotated` makes it.
_OLDER = re.compile(r"\.[0-9]+(\.[^.]+)$")


@dataclass(slots=True)
class Verification:
    """What was found."""

    lines: int = 0
    first: int = 0
    """The number of the first line that is whole."""
    last: ChainLink = BEGINNING
    """The last line that is in its place."""
    problems: list[str] = field(default_factory=list)
    """What can't be but by tampering, or a damaged disk; the first `MAX_PROBLEMS`."""
    notes: list[str] = field(default_factory=list)
    """What may have been tampering, and may have happened without."""


def verify(files: Sequence[Path], key: bytes) -> Verification:
    """Verify files, in any order, as one chain.

    Raises:
        OSError: one can't be read.
    """
    found = Verification()
    # First, since a server that runs writes it last.
    copies = [copy for file in files for copy in _copies(file, key)]
    in_order = sorted(files, key=lambda file: _first_number(file, key))
    found.problems += islice(_problems(in_order, key, found), MAX_PROBLEMS)
    last, copy = found.last, max(copies, default=None)
    if found.lines and last is BEGINNING:
        with_key = "no line has a seal of this key: is it the key of this log?"
        without = "no line has a seal without a key: is it an audit log, and needs it --key-file?"
        found.problems = [with_key if key else without]
    elif copy is None and found.lines:
        lost = "lines that were cut off the end leave no trace"
        where = copy_of_last(in_order[-1])
        found.notes.append(f"without a copy of the last line in {where}, {lost}")
    elif copy is not None and len(found.problems) < MAX_PROBLEMS:
        if copy.number > last.number:
            found.problems.append(f"{_numbers(last.number + 1, copy.number)} missing at the end")
        elif copy.number == last.number and copy.seal != last.seal:
            found.problems.append("the last line is another than its copy")
    return found


def _problems(files: Sequence[Path], key: bytes, found: Verification) -> Iterator[str]:
    """Yield the problems in order, and set what else was found."""
    for file in files:
        for number, line in enumerate(_lines(file), 1):
            place = f"{file}:{number}"
            found.lines += 1
            last, link = found.last, read_line(key, line)
            if link is None and not line.endswith(b"\n") and file == files[-1]:
                found.lines -= 1
                cut = "it was being written, or a kill or a full disk cut it"
                found.notes.append(f"{place} has no end: {cut}")
            elif link is None:
                yield f"{place} was changed or inserted"
            elif link.number <= last.number:
                yield f"{place} was moved or repeated: number {link.number} behind {last.number}"
            else:
                found.last = link
                if last is BEGINNING:
                    found.first = link.number
                    if link.number > 1:
                        lost = "those before were rotated away, or removed"
                        found.notes.append(f"{place} has number {link.number}: {lost}")
                elif link.number > last.number + 1:
                    yield f"{_numbers(last.number + 1, link.number - 1)} missing before {place}"
                elif link.previous != last.seal:
                    yield f"{place} doesn't follow the one before: one of them was sealed anew"


def _numbers(first: int, last: int) -> str:
    return f"number {first} is" if first == last else f"numbers {first} to {last} are"


def _copies(file: Path, key: bytes) -> Iterator[ChainLink]:
    """Yield the copy that is kept for a file, which may be an older one or look like one."""
    for newest in {file.name, _OLDER.sub(r"\1", file.name)}:
        with suppress(FileNotFoundError):
            copy = read_line(key, copy_of_last(file.with_name(newest)).read_bytes())
            if copy is not None:
                yield copy


def _first_number(file: Path, key: bytes) -> int:
    links = (read_line(key, line) for line in _lines(file))
    return next((link.number for link in links if link is not None), 0)


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        # One that is too long is changed, and comes in pieces.
        while line := source.readline(MAX_LINE_BYTES):
            yield line
