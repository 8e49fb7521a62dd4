"""Formats of answers: the fields that differ in each response, and the signs of a finished answer.

They follow vLLM's `ChatCompletionResponse`, `ResponsesResponse` and `AnthropicMessagesResponse`,
and the events that it makes of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

ID = b"\x00"
"""The mark in place of an id. JSON forbids this byte unescaped, so no answer contains it."""
CREATED = b"\x01"
"""The mark in place of a time (Unix s)."""


class Encoding(IntEnum):
    """How an answer is encoded."""

    JSON = 0
    """One JSON body."""
    SSE = 1
    """Server-sent events (`data: …`, an empty line), without the final `[DONE]`."""


_QUOTED_ID = b'"' + ID + b'"'
_UNFINISHED = (None, "abort", "error")


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerFormat:
    """The format that the answers of some routes have."""

    marks: Mapping[str, bytes]
    """The marks in place of the fields of a body that differ in each response.

    All else stays as the engine once gave it, ids of tool calls and of output items included:
    clients send them back, and so the next request of a conversation repeats as the first did.
    """
    is_finished: Callable[[dict[str, Any]], bool] = lambda _: True
    """Whether a body, or the object in a finish event, belongs to an answer that ended by itself.
    """
    done: bytes = b""
    """What follows the last event."""
    envelope: str | None = None
    """The field of an event that holds the marked fields; `None` where the event itself does."""
    finish_events: Mapping[str, str] = field(default_factory=dict)
    """Types of events that hold how the answer ended, with the field that holds it."""
    last_events: frozenset[str] = frozenset()
    """Types of events that end a stream where no `done` does."""
    failure_events: frozenset[str] = frozenset()
    """Types of events that end a stream without an answer."""
    hides_aborts: bool = False
    """Whether an answer that a stopping engine has aborted looks like a whole one."""


def are_finished(choices: Any) -> bool:
    """Whether every choice of a body ended by itself."""
    return bool(choices) and all(c.get("finish_reason") not in _UNFINISHED for c in choices)


def _is_response_finished(response: dict[str, Any]) -> bool:
    details, counts = response.get("incomplete_details"), response.get("usage")
    if response["status"] == "completed":
        # A vLLM that takes no more requests gives an empty answer.
        return not counts or counts["output_tokens"] > 0
    # vLLM gives this reason for an answer without output, too, however that ended.
    return bool(
        details
        and counts
        and details["reason"] == "max_output_tokens"
        and counts["output_tokens"] >= response["max_output_tokens"]
    )


CHOICES = AnswerFormat(
    marks={"id": _QUOTED_ID, "created": CREATED},
    is_finished=lambda body: are_finished(body["choices"]),
    done=b"data: [DONE]\n\n",
)
"""Of chat completions and completions: the only format that can be converted."""
RESPONSE = AnswerFormat(
    marks={"id": _QUOTED_ID, "created_at": CREATED},
    is_finished=_is_response_finished,
    envelope="response",
    finish_events={"response.completed": "response", "response.incomplete": "response"},
    last_events=frozenset({"response.completed", "response.incomplete"}),
    failure_events=frozenset({"error", "response.failed"}),
    hides_aborts=True,
)
"""Of OpenAI's Responses."""
MESSAGE = AnswerFormat(
    marks={"id": _QUOTED_ID},
    is_finished=lambda body: body.get("stop_reason") is not None,
    envelope="message",
    finish_events={"message_delta": "delta"},
    last_events=frozenset({"message_stop"}),
    failure_events=frozenset({"error"}),
)
"""Of Anthropic's Messages. A body leaves out what is null."""
OPAQUE = AnswerFormat(marks={"id": _QUOTED_ID, "created": CREATED})
"""Of bodies that are large or simple, such as vectors. Only their beginning is read."""
