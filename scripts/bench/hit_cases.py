"""The cases of `hits.py`: their questions, and the answers that an upstream gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import orjson

_WORDS = ["the", "sky", "scatters", "light", "of", "short", "waves", "more", "than", "red", "so"]
_QUESTIONS_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked, and of what product."""

    what: str
    question_bytes: int = 4000
    """Of a request's body."""
    text_bytes: int = 2000
    """Of an answer's text."""
    stream: bool = False
    connections: int = 32
    questions: int = 512
    """How many different ones; fewer where these have more than `_QUESTIONS_BYTES`."""
    new_heads: bool = False
    """Whether each request has a trace id of its own, so that none is known by its bytes."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the product's configuration."""
    is_told: bool = False
    """Whether README's table has it."""

    @property
    def content_type(self) -> str:
        """What an answer is."""
        return "text/event-stream" if self.stream else "application/json"


# They have 4 kB questions, 2 kB answers and 32 connections where they don't say otherwise.
CASES = {
    "500B": Case(what="500 B questions, 300 B answers", question_bytes=500, text_bytes=300),
    "4kB": Case(what="4 kB questions, 2 kB answers", is_told=True),
    "64kB": Case(what="64 kB questions", question_bytes=64_000, is_told=True),
    "1MB": Case(what="1 MB questions", question_bytes=1_000_000),
    "100kB-answers": Case(what="100 kB answers", text_bytes=100_000),
    "short-streams": Case(what="streams of 300 B of text", text_bytes=300, stream=True),
    "streams": Case(what="streams of 2 kB of text", stream=True),
    "1-connection": Case(what="1 connection", connections=1),
    "1000-connections": Case(what="1,000 connections", connections=1000),
    "no-key": Case(what="without a key", fields={"tenants": {}}),
    "log": Case(what="with an access log", fields={"log": {"level": "info"}}),
    "trace-ids": Case(what="a trace id of its own in each head", new_heads=True, is_told=True),
    "tasks": Case(what="`known_requests: false`", fields={"server": {"known_requests": False}}),
}


def questions(case: Case) -> list[bytes]:
    """Return the bodies of a case's requests."""
    many = min(case.questions, _QUESTIONS_BYTES // case.question_bytes)
    return [_question(case, number) for number in range(many)]


def _question(case: Case, number: int) -> bytes:
    asked: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 500}
    if case.stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    text = f"Question {number}: " + "why is the sky blue? " * (case.question_bytes // 21)
    empty = orjson.dumps({**asked, "messages": [{"role": "user", "content": ""}]})
    message = {"role": "user", "content": text[: case.question_bytes - len(empty)]}
    return orjson.dumps({**asked, "messages": [message]})


def answer(case: Case) -> bytes:
    """Return an answer as vLLM gives it."""
    # Words by chance, so that compression would have something to do.
    words = Random(0).choices(_WORDS, k=case.text_bytes)  # noqa: S311
    text = " ".join(words)[: case.text_bytes]
    usage = {"prompt_tokens": 20, "total_tokens": 420, "completion_tokens": 400}
    kind = "chat.completion.chunk" if case.stream else "chat.completion"
    head = {"id": "chatcmpl-" + "0" * 32, "object": kind, "created": 1700000000, "model": "m"}
    if not case.stream:
        message = {"role": "assistant", "content": text}
        whole = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return orjson.dumps({**head, "choices": [whole], "usage": usage})
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word + " "} for word in text.split()]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
    ]
    choices[-1]["finish_reason"] = "stop"
    chunks = [*({**head, "choices": [choice]} for choice in choices)]
    chunks.append({**head, "choices": [], "usage": usage})
    return b"".join(b"data: %b\n\n" % orjson.dumps(c) for c in chunks) + b"data: [DONE]\n\n"
