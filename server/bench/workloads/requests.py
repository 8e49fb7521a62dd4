"""Requests: what is asked as the JSON body of each route.

Bodies ask for temperature 0 unless they are told otherwise, since an answer that is sampled isn't
cached, and for token counts at the end of a stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import orjson

from server.bench.workload import Step

Route = Literal["chat", "completions", "responses", "messages", "embeddings"]
PATHS: dict[Route, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "embeddings": "/v1/embeddings",
}
ROUTES: tuple[Route, ...] = get_args(Route)
_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
_SAMPLED = 1.0


class Message(NamedTuple):
    """What one side of a chat says; the role is `system`, `user` or `assistant`."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Common:
    """What all requests of a run have in common.

    Attributes:
        model: the name that the endpoint gives it.
        route: what is asked. stream: whether answers are streamed; embeddings never are.
        max_tokens: of an answer. Where a file has a number for each request, this is the most;
            elsewhere it replaces the workload's own. None leaves both as they are.
        temperature: of answers; 0 so that they are kept.
        seed: of everything that is drawn.
        ignore_eos: whether answers go on up to `max_tokens`; vLLM's field.
        tag: of `cache.tags`, for a tierserve: the label by which a run's entries are purged.
        nonce: words before each prompt that keep it apart from what a server knows already.
        first_session: the number at which an endless workload begins, so that the probes of one
            run don't repeat what should be unseen.
    """

    model: str
    route: Route = "chat"
    stream: bool = True
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    tag: str = ""
    nonce: str = ""
    first_session: int = 0


def user(text: str) -> Message:
    """Return what a user says."""
    return Message(_USER, text)


def assistant(text: str) -> Message:
    """Return what the model is said to have answered."""
    return Message(_ASSISTANT, text)


def system(text: str) -> Message:
    """Return what stands before a chat."""
    return Message(_SYSTEM, text)


def make_step(
    common: Common,
    messages: Sequence[Message],
    max_tokens: int,
    *,
    think_s: float = 0.0,
    sampled: bool = False,
) -> Step:
    """Return the request that goes on with a chat.

    Args:
        common: what all requests have in common.
        messages: the chat; one at least. Where a route takes one text, it is their transcript.
        max_tokens: of the answer.
        think_s: how long the user thinks before.
        sampled: whether the answer is sampled, and so may not be cached.
    """
    first = messages[0]
    if common.nonce:
        messages = [Message(first.role, f"{common.nonce} {first.text}"), *messages[1:]]
    body = {"model": common.model} | _prompt(common.route, messages)
    if common.route != "embeddings":
        body[_LIMITS.get(common.route, "max_tokens")] = max_tokens
        body["temperature"] = _SAMPLED if sampled else common.temperature
    return step_of(common, common.route, body, think_s)


def step_of(common: Common, route: Route, body: dict[str, Any], think_s: float = 0.0) -> Step:
    """Return the request with a body, to which it adds what the options say of all bodies."""
    streams = common.stream and route != "embeddings"
    if streams:
        body["stream"] = True
        if route in ("chat", "completions"):
            body["stream_options"] = {"include_usage": True}
    if common.ignore_eos:
        body["ignore_eos"] = True
    if common.tag:
        body["cache"] = {"tags": [common.tag]}
    return Step(PATHS[route], orjson.dumps(body), streams, think_s)


_LIMITS: dict[Route, str] = {"responses": "max_output_tokens"}


def _prompt(route: Route, messages: Sequence[Message]) -> dict[str, Any]:
    """Return the fields that hold the prompt."""
    if route == "completions":
        return {"prompt": _transcript(messages, "\n\nAssistant:")}
    if route == "embeddings":
        return {"input": _transcript(messages, "")}
    if route == "chat":
        return {"messages": _as_objects(messages)}
    # The others have a field for what stands before a chat.
    field = "instructions" if route == "responses" else "system"
    has_system = messages[0].role == _SYSTEM
    head = {field: messages[0].text} if has_system else {}
    rest = _as_objects(messages[1:] if has_system else messages)
    if route == "responses":
        # A server that keeps the answer for later requests would fill up.
        return head | {"input": rest, "store": False}
    return head | {"messages": rest}


def _as_objects(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def _transcript(messages: Sequence[Message], end: str) -> str:
    if len(messages) == 1:
        return messages[0].text
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in messages) + end
