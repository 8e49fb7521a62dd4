"""Prompts that repeat by Zipf's law, as what people ask and search for does.

The prompt of rank k (from 1) is asked with a probability proportional to k^-s (G. K. Zipf, 1949;
Breslau et al., «Web Caching and Zipf-like Distributions», 1999, found 0.64 to 0.83 for the web).
The rank of a session is the exact inverse of that distribution at a number drawn from its own
number, so no session depends on another.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from server.bench.records import Floats
from server.bench.workload import Session, Step
from server.bench.workloads.base import EndlessWorkload, Options
from server.bench.workloads.requests import Common, user
from server.bench.workloads.texts import draw, first_questions, question, search_query, words

# Of the most frequent requests, so that they aren't made again and again.
_KEPT_BYTES = 16 * 1024**2


class ZipfOptions(Options):
    """Which prompts repeat, and how often."""

    s: Annotated[float, Field(ge=0, le=10)] = 1.1
    """Exponent; 0 makes all equally frequent."""
    prompts: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """How many different prompts repeat."""
    unique: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of requests whose prompt no other request has."""
    context: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Tokens of text that stand before each question, other ones for each."""


class Zipf(EndlessWorkload[ZipfOptions]):
    """One question a session: MT-bench's by rank, then made ones."""

    def __init__(self, name: str, kind: str, options: ZipfOptions, common: Common) -> None:
        super().__init__(name, kind, options, common)
        self._kept: dict[int, Session] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def repeated(self) -> Iterator[Step]:
        for rank in range(self.options.prompts):
            yield from self._of_rank(rank).steps

    def _made(self, number: int) -> Session:
        drawn, unique = draw(self.common.seed, "rank", number), self.options.unique
        if drawn < unique:
            return self._asking(self._new_question("unique", number), ("unique", number))
        options = self.options
        return self._of_rank(rank_at((drawn - unique) / (1 - unique), options.s, options.prompts))

    def _of_rank(self, rank: int) -> Session:
        """Return the session that asks the prompt of a rank, from 0."""
        if (kept := self._kept.get(rank)) is not None:
            return kept
        made = self._asking(self._question(rank), ("repeated", rank))
        if (rank + 1) * len(made.steps[0].body) <= _KEPT_BYTES:
            self._kept[rank] = made
        return made

    def _asking(self, text: str, label: tuple[object, ...]) -> Session:
        if self.options.context:
            context = words(self.common.seed, ("context", *label), self.options.context)
            text = f"{context}\n\n{text}"
        return Session((self._step([user(text)]),))

    def _question(self, rank: int) -> str:
        known = first_questions()
        return known[rank] if rank < len(known) else self._new_question("repeated", rank)

    def _new_question(self, *label: object) -> str:
        return question(self.common.seed, *label)


class SearchOptions(ZipfOptions):
    """Nine of ten queries repeat, so that a warm cache answers 90%."""

    prompts: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """How many different queries repeat."""
    unique: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of queries that nobody else has."""


class Search(Zipf):
    """What people type into a search box that a model answers.

    The embedded model takes some two seconds for an answer on two cores, at 12 to 24 tokens a
    second.
    """

    answer_tokens = 40

    def _question(self, rank: int) -> str:
        return self._new_question("repeated", rank)

    def _new_question(self, *label: object) -> str:
        return f"Answer this search: {search_query(self.common.seed, *label)}"


def rank_at(drawn: float, s: float, prompts: int) -> int:
    """Return the rank, from 0, whose part of the distribution a number in [0, 1) is in."""
    rank = int(_cumulative(s, prompts).searchsorted(drawn, side="right"))
    # A number that was scaled may have been rounded to 1.
    return min(rank, prompts - 1)


@lru_cache(4)
def _cumulative(s: float, prompts: int) -> Floats:
    """Return the probabilities that the rank is at most 1, 2, …; the last one is 1."""
    summed = np.cumsum(np.arange(1, prompts + 1, dtype=np.float64) ** -s)
    return np.asarray(summed / summed[-1])
