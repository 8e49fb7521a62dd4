"""Requests that share a beginning and nothing else, as those of an application do."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from server.bench.workload import Session, Step
from server.bench.workloads.base import EndlessWorkload, Options
from server.bench.workloads.chats import Tokens
from server.bench.workloads.requests import system, user
from server.bench.workloads.texts import draw, question, words
from server.bench.workloads.zipf import rank_at


class SharedPrefixOptions(Options):
    """How many beginnings, and how long."""

    systems: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Different system prompts."""
    system: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    """Tokens of a system prompt."""
    tail: Tokens = 32
    """Tokens that a request has beside its question, which no other has."""
    s: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Zipf's exponent of the system prompts; 0 makes them equally frequent."""


class SharedPrefixes(EndlessWorkload[SharedPrefixOptions]):
    """One request a session: a common system prompt and a question of its own."""

    answer_tokens = 64

    def repeated(self) -> Iterator[Step]:
        for number in range(self.options.systems):
            yield self._asking(number, ("warm", number))

    def _made(self, number: int) -> Session:
        drawn = draw(self.common.seed, "system of", number)
        chosen = rank_at(drawn, self.options.s, self.options.systems)
        return Session((self._asking(chosen, ("own", number)),))

    def _asking(self, number: int, label: tuple[object, ...]) -> Step:
        seed, options = self.common.seed, self.options
        text = question(seed, *label)
        if options.tail:
            text = f"{text} {words(seed, ('tail', *label), options.tail)}"
        return self._step([system(words(seed, ("system", number), options.system)), user(text)])
