"""Chats of several turns: each request has all of the chat before it.

What the model says is scripted, too: a request never has what an endpoint answered. So requests
stay functions of the seed, two runs send the same ones, and an endpoint with other answers gets no
other load. The price: an engine has the tokens of its own answer in its cache, but not those of
the script, and computes these once more in the next turn.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from server.bench.workload import Session, Step
from server.bench.workloads.base import EndlessWorkload, Options
from server.bench.workloads.requests import Message, assistant, system, user
from server.bench.workloads.texts import draw, question, thinking_s, words

Tokens = Annotated[int, Field(ge=0, le=1_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class ChatOptions(Options):
    """The shape of chats."""

    turns: Annotated[int, Field(ge=1, le=100)] = 6
    """Of the user, each of which is a request."""
    think: Seconds = 2.0
    """Mean seconds that a user thinks before the next turn, exponentially distributed."""
    systems: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Different system prompts, equally frequent."""
    system: Tokens = 64
    """Tokens of a system prompt; 0 for none."""
    user: Tokens = 24
    """Tokens that a turn has beside its question."""
    assistant: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Tokens of a scripted answer."""
    repeat: Share = 0.2
    """Share of chats that are held word for word by several users."""
    known: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Different chats among these."""


class Chats(EndlessWorkload[ChatOptions]):
    """One chat a session, of which a share repeats."""

    def repeated(self) -> Iterator[Step]:
        if self.options.repeat:
            for number in range(self.options.known):
                yield from self._chat(("known", number)).steps
        elif self.options.system:
            for number in range(self.options.systems):
                beginning = self._beginning(number)
                yield self._step([*beginning, user(question(self.common.seed, "warm", number))])

    def _made(self, number: int) -> Session:
        drawn, repeat = draw(self.common.seed, "chat", number), self.options.repeat
        if drawn < repeat:
            known = self.options.known
            return self._chat(("known", min(int(drawn / repeat * known), known - 1)), number)
        return self._chat(("own", number), number)

    def _chat(self, label: tuple[str, int], number: int = 0) -> Session:
        """Return a chat as the user of a session holds it, who has a pace of his own."""
        seed, options = self.common.seed, self.options
        messages = self._beginning(int(draw(seed, "system of", *label) * options.systems))
        steps = []
        for turn in range(options.turns):
            if turn:
                messages.append(assistant(words(seed, ("said", *label, turn), options.assistant)))
            messages.append(user(self._asked(label, turn)))
            steps.append(self._step(messages, thinking_s(seed, options.think, number, turn)))
        return Session(tuple(steps))

    def _beginning(self, number: int) -> list[Message]:
        tokens = self.options.system
        return [system(words(self.common.seed, ("system", number), tokens))] if tokens else []

    def _asked(self, label: tuple[str, int], turn: int) -> str:
        seed, more = self.common.seed, self.options.user
        asked = question(seed, *label, turn)
        return f"{asked} {words(seed, ('more', *label, turn), more)}" if more else asked


class ConversationOptions(ChatOptions):
    """Every user has something of their own to say."""

    repeat: Share = 0.02
    """Share of chats that are held word for word by several users."""
