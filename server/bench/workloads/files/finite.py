"""Workloads that are read from files of JSON objects, with one session for each."""

from abc import abstractmethod
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import numpy as np

from server.bench.records import Floats, Integers
from server.bench.workload import Session, Step
from server.bench.workloads.base import BuiltWorkload, OptionsT
from server.bench.workloads.files.pieces import Piece, PieceFile, content_digest, pieces, problem
from server.bench.workloads.requests import Common


class FiniteWorkload(BuiltWorkload[OptionsT]):
    """A workload of a file; a warm cache knows all of its requests.

    Args:
        path: of the file.

    Raises:
        ConfigError: the file can't be read, or isn't what it should be.
    """

    holds: ClassVar[str]
    """What the file should hold, for errors."""
    times_s: Floats | None = None
    """When sessions begin, from 0; None where the file doesn't say it."""

    def __init__(self, name: str, kind: str, options: OptionsT, common: Common, path: Path) -> None:
        super().__init__(name, kind, options, common)
        self._content = content_digest(path)
        self.count = self._read(path)
        if not self.count:
            raise problem(path, f"should hold {self.holds}")

    @abstractmethod
    def _read(self, path: Path) -> int:
        """Read the file; returns the number of sessions."""

    def content(self) -> str:
        return self._content

    def times(self, count: int) -> list[float] | None:
        return None if self.times_s is None else self.times_s[:count].tolist()

    def repeated(self) -> Iterator[Step]:
        known: set[bytes] = set()
        for number in range(self.count or 0):
            for step in self.session(number).steps:
                digest = blake2b(step.body, key=step.path.encode(), digest_size=16).digest()
                if digest not in known:
                    known.add(digest)
                    yield step

    def _at_s(self, number: int) -> float | None:
        return None if self.times_s is None else float(self.times_s[number])

    def _limit(self, tokens: int | None) -> int:
        """Return `max_tokens` of a request for which the file has a number, or none."""
        most = self.common.max_tokens
        if tokens is None:
            return most or self.answer_tokens
        return max(1, tokens if most is None else min(tokens, most))


class PieceWorkload(FiniteWorkload[OptionsT]):
    """A workload of JSON objects, which stay in the file until their sessions are asked for."""

    _pieces: PieceFile

    @abstractmethod
    def _add(self, piece: Piece) -> bool:
        """Check an object; returns whether it is a session.

        Raises:
            ValueError: it isn't what it should be.
        """

    @abstractmethod
    def session(self, number: int) -> Session: ...

    def _read(self, path: Path) -> int:
        spans = array("q")
        for piece in pieces(path):
            try:
                is_session = self._add(piece)
            except ValueError as exc:
                raise problem(path, str(exc), piece.line) from exc
            if is_session:
                spans.extend((piece.start, piece.end))
        self._pieces = PieceFile(path, spans)
        return len(self._pieces)


def in_time(times: "array[float]") -> tuple[Integers, Floats]:
    """Return in which order sessions begin, and when they do, counted from the first."""
    at_s = np.array(times, dtype=np.float64)
    order = np.argsort(at_s, kind="stable")
    at_s = at_s[order]
    return order, at_s - at_s[:1]
