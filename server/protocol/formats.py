"""Shapes of answers: what is new each time an answer is given, and how a finished one is told.

vLLM says it in `ChatCompletionResponse`, `ResponsesResponse` and `AnthropicMessagesResponse`, and
in the events that it makes of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

ID = b"\x00"
CREATED = b"\x01"


class Encoding(IntEnum):
    """How the engine gave an answer, and in which encoding a client asks for it."""

    JSON = 0
    """One JSON body."""
    SSE = 1
    """Server-sent events (`data: …`, an empty line), without the final `[DONE]`."""


_FRESH_ID = b'"' + ID + b'"'
_UNFINISHED = (None, "abort", "error")


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerFormat:
    """How the answers of some routes look."""

    marks: Mapping[str, bytes]
    """The marks in place of fields of a body that differ each time an answer is given.

    All else is given as the engine once gave it, ids of tool calls and of output items included:
    clients send them back, and so the next request of a conversation repeats as the first did.
    """
    is_finished: Callable[[dict[str, Any]], bool] = lambda _: True
    """Whether a body, or what an event says of the end, is that of an answer that ended by itself.
    """
    done: bytes = b""
    """What follows the last event."""
    envelope: str | None = None
    """The field of an event that holds what is fresh; `None` where the event itself does."""
    finish_events: Mapping[str, str] = field(default_factory=dict)
    """Types of events that say how it ended, with the field that says it."""
    last_events: frozenset[str] = frozenset()
    """Types of events of which one ends a stream, where no `done` does."""
    failure_events: frozenset[str] = frozenset()
    """Types of events that end one without an answer."""
    hides_aborts: bool = False
    """Whether an answer that the engine has aborted, since it stops, is told as a whole one."""


def are_finished(choices: Any) -> bool:
    """Whether every choice of a body ended by itself."""
    return bool(choices) and all(c.get("finish_reason") not in _UNFINISHED for c in choices)


def _is_response_finished(response: dict[str, Any]) -> bool:
    details, counts = response.get("incomplete_details"), response.get("usage")
    if response["status"] == "completed":
        # Nothing is what a vLLM gives that takes no more requests.
        return not counts or counts["output_tokens"] > 0
    # vLLM says so of one without output, too, however that ended.
    return bool(
        details
        and counts
        and details["reason"] == "max_output_tokens"
        and counts["output_tokens"] >= response["max_output_tokens"]
    )


CHOICES = AnswerFormat(
    marks={"id": _FRESH_ID, "created": CREATED},
    is_finished=lambda body: are_finished(body["choices"]),
    done=b"data: [DONE]\n\n",
)
"""Of chat completions and completions; the only one of which either form makes the other."""
RESPONSE = AnswerFormat(
    marks={"id": _FRESH_ID, "created_at": CREATED},
    is_finished=_is_response_finished,
    envelope="response",
    finish_events={"response.completed": "response", "response.incomplete": "response"},
    last_events=frozenset({"response.completed", "response.incomplete"}),
    failure_events=frozenset({"error", "response.failed"}),
    hides_aborts=True,
)
"""Of OpenAI's Responses."""
MESSAGE = AnswerFormat(
    marks={"id": _FRESH_ID},
    is_finished=lambda body: body.get("stop_reason") is not None,
    envelope="message",
    finish_events={"message_delta": "delta"},
    last_events=frozenset({"message_stop"}),
    failure_events=frozenset({"error"}),
)
"""Of Anthropic's Messages. A body leaves out what is null."""
OPAQUE = AnswerFormat(marks={"id": _FRESH_ID, "created": CREATED})
"""A body that is large or has little in it, such as vectors: read only where it begins."""
