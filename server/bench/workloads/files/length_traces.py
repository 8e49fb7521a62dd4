"""Traces of times and lengths alone: Azure's and BurstGPT's CSV, one request a row.

They don't tell which prompts were equal, so each is a text of its own: no cache gives a hit.
"""

import csv
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import numpy as np

from server.bench.records import Integers
from server.bench.workload import Session
from server.bench.workloads.files.fields import Row, count_of, seconds_of, text_of
from server.bench.workloads.files.finite import FiniteWorkload, in_time
from server.bench.workloads.files.pieces import problem, unreadable
from server.bench.workloads.files.trace_prompts import TraceOptions, block_prompt
from server.bench.workloads.requests import make_step, user


class LengthTrace(FiniteWorkload[TraceOptions]):
    """Rows with a time, tokens of a prompt and tokens of its answer, as three columns."""

    columns: ClassVar[tuple[str, str, str]]
    _prompts: Integers
    _answers: Integers

    def session(self, number: int) -> Session:
        scale, options = self.options.scale, self.options
        tokens = round(int(self._prompts[number]) * scale)
        rest = (self.content(), number)
        text = block_prompt(self.common.seed, (), 1, tokens, rest, options)
        limit = self._limit(round(int(self._answers[number]) * scale))
        return Session((make_step(self.common, [user(text)], limit),), self._at_s(number))

    def _read(self, path: Path) -> int:
        times, prompts, answers = array("d"), array("q"), array("q")
        at, asked, answered = self.columns
        for line, row in _rows(path):
            try:
                tokens = count_of(row, answered)
                if tokens:
                    times.append(self._seconds(row, at))
                    prompts.append(count_of(row, asked))
                    answers.append(tokens)
            except ValueError as exc:
                raise problem(path, str(exc), line) from exc
        order, self.times_s = in_time(times)
        self._prompts = np.array(prompts, dtype=np.int64)[order]
        self._answers = np.array(answers, dtype=np.int64)[order]
        return len(order)

    def _seconds(self, row: Row, name: str) -> float:
        return seconds_of(row, name)


class Azure(LengthTrace):
    """Azure's LLM inference traces (Azure/AzurePublicDataset)."""

    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    holds = "rows with TIMESTAMP, ContextTokens and GeneratedTokens"

    def _seconds(self, row: Row, name: str) -> float:
        text = text_of(row, name)
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{name} should be a date, not {text!r}") from None
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


class BurstGpt(LengthTrace):
    """BurstGPT's traces (HPMLL/BurstGPT), but for requests without an answer, which had failed."""

    columns = ("Timestamp", "Request tokens", "Response tokens")
    holds = "rows with Timestamp, Request tokens and Response tokens"


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                yield rows.line_num, row
    except OSError as exc:
        raise unreadable(path, exc) from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise problem(path, f"should be CSV: {exc}") from exc
