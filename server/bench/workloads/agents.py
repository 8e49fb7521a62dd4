"""Agents: transcripts that grow from step to step, and steps that are sent again word for word.

An agent repeats a step when its client has lost patience, its process has died, or its plan went
back to where it was. Calls and observations are text, since not every model has tools; they are
scripted, as in `server.bench.workloads.chats`.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from server.bench.workload import Session, Step
from server.bench.workloads.base import EndlessWorkload, Options
from server.bench.workloads.chats import Share
from server.bench.workloads.requests import Message, assistant, system, user
from server.bench.workloads.texts import draw, question, words


class AgentOptions(Options):
    """The shape of tasks."""

    steps: Annotated[int, Field(ge=1, le=100)] = 8
    """Of a task, each of which is a request."""
    retry: Share = 0.2
    """Share of steps that are sent once more."""
    system: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Tokens of the instructions, which all agents share."""
    call: Annotated[int, Field(ge=1, le=1_000_000)] = 24
    """Tokens of what the agent does in a step."""
    observation: Annotated[int, Field(ge=1, le=1_000_000)] = 96
    """Tokens of what it then sees."""


class Agents(EndlessWorkload[AgentOptions]):
    """One task a session."""

    answer_tokens = 48

    def repeated(self) -> Iterator[Step]:
        yield self._step([self._instructions(), user(question(self.common.seed, "warm"))])

    def _made(self, number: int) -> Session:
        seed, options = self.common.seed, self.options
        messages = [self._instructions(), user(question(seed, "task", number))]
        steps = []
        for turn in range(options.steps):
            if turn:
                call = words(seed, ("call", number, turn), options.call)
                seen = words(seed, ("seen", number, turn), options.observation)
                messages += [assistant(call), user(f"Observation: {seen}")]
            step = self._step(messages)
            again = draw(seed, "again", number, turn) < options.retry
            steps += [step, step] if again else [step]
        return Session(tuple(steps))

    def _instructions(self) -> Message:
        return system(words(self.common.seed, ("instructions",), self.options.system))
