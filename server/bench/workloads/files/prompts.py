"""Files of prompts and chats: ShareGPT's JSON, vLLM's custom JSONL, and MT-bench's questions."""

from typing import Annotated, Any

from pydantic import Field

from server.bench.workload import Session, Step
from server.bench.workloads.base import Options
from server.bench.workloads.chats import Seconds
from server.bench.workloads.files.fields import count_of, list_of, text_of
from server.bench.workloads.files.finite import PieceWorkload
from server.bench.workloads.files.pieces import Piece
from server.bench.workloads.requests import Message, assistant, make_step, system, user
from server.bench.workloads.texts import thinking_s, words

_CHARACTERS_PER_TOKEN = 4
"""Of English text, about; a file of texts has no token counts."""
_ROLES = {
    "human": user, "user": user, "system": system, "gpt": assistant, "assistant": assistant,
    "chatgpt": assistant, "bing": assistant, "bard": assistant, "model": assistant,
}  # fmt: skip


class CustomOptions(Options):
    """There are none."""


class Custom(PieceWorkload[CustomOptions]):
    """vLLM's custom JSONL: `prompt`, and `output_tokens` if the answer has a length of its own."""

    holds = "lines with prompt and, if wanted, output_tokens"

    def _add(self, piece: Piece) -> bool:
        text_of(piece.fields, "prompt")
        _output_tokens(piece.fields)
        return True

    def session(self, number: int) -> Session:
        fields = self._pieces.fields(number)
        limit = self._limit(_output_tokens(fields))
        return Session((make_step(self.common, [user(text_of(fields, "prompt"))], limit),))


def _output_tokens(fields: dict[str, Any]) -> int | None:
    return count_of(fields, "output_tokens") if fields.get("output_tokens") is not None else None


class TurnOptions(Options):
    """How much of each chat is sent."""

    turns: Annotated[int, Field(ge=1, le=100)] = 1
    """The user's first turns, each of which is a request."""
    think: Seconds = 0.0
    """Mean seconds that a user thinks before the next turn, exponentially distributed."""


class ShareGptOptions(TurnOptions):
    """How much of each chat is sent."""

    max_prompt_tokens: Annotated[int, Field(ge=16)] | None = None
    """Turns with longer prompts, at four characters a token, are left out."""


class ShareGpt(PieceWorkload[ShareGptOptions]):
    """Chats of people with ChatGPT: an array of objects with `conversations`.

    An answer may be as long as the one in the file, and that one stands for it in later turns.
    Chats in which the user says nothing are left out.
    """

    holds = "chats, each with conversations in which human and gpt take turns"

    def _add(self, piece: Piece) -> bool:
        return bool(self._turns(piece.fields))

    def session(self, number: int) -> Session:
        steps = []
        for turn, (messages, tokens) in enumerate(self._turns(self._pieces.fields(number))):
            thought = thinking_s(self.common.seed, self.options.think, number, turn)
            step = make_step(self.common, messages, self._limit(tokens), think_s=thought)
            steps.append(step)
        return Session(tuple(steps))

    def _turns(self, fields: dict[str, Any]) -> list[tuple[list[Message], int | None]]:
        """Return the chat up to each turn of the user, and the tokens of the file's answer."""
        said = [_message(each) for each in list_of(fields, "conversations")]
        found: list[tuple[list[Message], int | None]] = []
        most = self.options.max_prompt_tokens
        characters = 0
        for number, message in enumerate(said):
            characters += len(message.text)
            if message.role != "user" or not message.text:
                continue
            is_long = most is not None and characters > most * _CHARACTERS_PER_TOKEN
            if is_long or len(found) == self.options.turns:
                break
            answer = said[number + 1] if number + 1 < len(said) else None
            tokens = None
            if answer is not None and answer.role == "assistant":
                tokens = -(-len(answer.text) // _CHARACTERS_PER_TOKEN)
            # A chat that was cut may begin with an answer.
            first = next(at for at, each in enumerate(said) if each.role != "assistant")
            found.append((said[first : number + 1], tokens))
        return found


def _message(fields: Any) -> Message:
    if not isinstance(fields, dict):
        raise ValueError("conversations should hold objects with from and value")
    make = _ROLES.get(text_of(fields, "from"))
    if make is None:
        raise ValueError(f"from should be one of {', '.join(_ROLES)}, not {fields['from']!r}")
    value = fields.get("value")
    if not isinstance(value, str):
        raise ValueError("value should be a text")
    return make(value)


class MtBenchOptions(TurnOptions):
    """How much of each question is sent."""

    assistant: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Tokens of the scripted answer before the second turn."""


class MtBench(PieceWorkload[MtBenchOptions]):
    """MT-bench's questions: lines with `turns`; 80 of them come with the package."""

    holds = "lines with turns, a list of questions"

    def _add(self, piece: Piece) -> bool:
        turns = list_of(piece.fields, "turns")
        if not turns or not all(isinstance(each, str) and each for each in turns):
            raise ValueError("turns should be a list of texts")
        return True

    def session(self, number: int) -> Session:
        messages: list[Message] = []
        steps: list[Step] = []
        seed, options = self.common.seed, self.options
        for turn, asked in enumerate(self._pieces.fields(number)["turns"][: options.turns]):
            if turn:
                messages.append(assistant(words(seed, ("said", number, turn), options.assistant)))
            messages.append(user(asked))
            steps.append(self._step(messages, thinking_s(seed, options.think, number, turn)))
        return Session(tuple(steps))
