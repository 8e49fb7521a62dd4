"""Files of many JSON objects, each of which can be read by its number.

Only where each object begins and ends is kept in memory: 16 bytes for each. The file has to stay
as it is while it is used.
"""

import mmap
import os
import re
import weakref
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
import orjson

from server.bench.records import Integers
from server.config.base import ConfigError

# Strings are skipped as wholes, so that no bracket in them counts.
_structure = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL).finditer
_CHUNK_BYTES = 1024**2


class Piece(NamedTuple):
    """An object of a file, and where it is."""

    line: int
    """Its number, from 1, of a JSONL file; of an array, that of the object."""
    start: int
    end: int
    """In bytes."""
    fields: dict[str, Any]


class PieceFile:
    """Reads pieces of a file by number; can be pickled.

    Args:
        path: of the file.
        spans: the first byte and the end of each piece, one after the other.
    """

    def __init__(self, path: Path, spans: "array[int]") -> None:
        self._path = path
        self._spans: Integers = np.array(spans, dtype=np.int64).reshape(-1, 2)
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def reorder(self, order: Integers) -> None:
        """Number the pieces anew: the first one is that which had the number `order[0]`."""
        self._spans = self._spans[order]

    def fields(self, number: int) -> dict[str, Any]:
        """Return the object of this number, from 0.

        Raises:
            ConfigError: the file isn't as it was.
        """
        start, end = self._spans[number].tolist()
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._file)
            fields = orjson.loads(os.pread(self._file, end - start, start))
        except (OSError, orjson.JSONDecodeError) as exc:
            raise problem(self._path, "should stay as it is while it is used") from exc
        if not isinstance(fields, dict):
            raise problem(self._path, "should stay as it is while it is used")
        return fields


def problem(path: Path, text: str, line: int | None = None) -> ConfigError:
    """Return the error of a file of a workload, with the line that it is in."""
    at = path if line is None else f"{path}:{line}"
    return ConfigError([f"--workload: {at}: {text}"])


def content_digest(path: Path) -> str:
    """Return a digest of a file's bytes.

    Raises:
        ConfigError: it can't be read.
    """
    digest = blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    return digest.hexdigest()


def require_file(path: Path) -> None:
    """Check that a path is that of a file, which can be read several times.

    Raises:
        ConfigError: it isn't.
    """
    try:
        is_file = S_ISREG(path.stat().st_mode)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if not is_file:
        raise problem(path, "should be a file, not a folder or a pipe")


def unreadable(path: Path, exc: OSError) -> ConfigError:
    """Return the error of a file that can't be read."""
    return problem(path, f"should be a readable file: {exc.strerror or exc}")


def pieces(path: Path) -> Iterator[Piece]:
    """Yield the objects of a JSONL file, or of a file that is one JSON array.

    Raises:
        ConfigError: the file can't be read, or isn't JSON.
    """
    try:
        with path.open("rb") as file:
            # A file may be one line, of any length.
            while (first := file.read(_CHUNK_BYTES)).isspace():
                pass
            file.seek(0)
            if first.lstrip().startswith(b"["):
                yield from _elements(path, file.fileno())
            else:
                yield from _lines(path, file)
    except OSError as exc:
        raise unreadable(path, exc) from exc


def _lines(path: Path, lines: Iterator[bytes]) -> Iterator[Piece]:
    start = 0
    for number, line in enumerate(lines, 1):
        end = start + len(line)
        if not line.isspace():
            yield Piece(number, start, end, _object(path, line, number))
        start = end


def _elements(path: Path, file: int) -> Iterator[Piece]:
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
        depth = number = start = 0
        for found in _structure(data):
            mark = data[found.start()]
            if mark == ord('"'):
                continue
            if mark in b"[{":
                depth += 1
                if depth == 2:
                    start = found.start()
            else:
                depth -= 1
                if depth == 1:
                    number += 1
                    yield Piece(
                        number, start, found.end(), _object(path, data[start : found.end()], number)
                    )
                elif depth == 0:
                    return
    raise problem(path, "should be JSON: the array has no end")


def _object(path: Path, text: bytes, number: int) -> dict[str, Any]:
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise problem(path, f"should be JSON: {exc}", number) from exc
    if not isinstance(fields, dict):
        raise problem(path, "should be a JSON object", number)
    return fields
