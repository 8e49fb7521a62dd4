"""Answers out of what an engine sends, and either form out of the other.

The engine's JSON is kept as it came but for marks: bytes that JSON forbids unescaped (RFC 8259,
section 7) and that therefore can't be part of an answer. They stand for what is fresh each time an
answer is given (`server.protocol.formats`), and around what belongs only into a stream without
token counts.

One form is made of the other only where nothing is left to guess: of text in fields of vLLM 0.32
that are all known here. Tool calls, reasoning and anything else can't be converted, since vLLM
makes them by one parser for bodies and by another for streams.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from server.protocol.formats import CREATED, Encoding
from server.protocol.template import (
    _DATA,
    _MARKS,
    json_template,
    sse_event,
    strip_usage_marks,
    with_fingerprint,
)
from tiers import Answer


class NotConvertibleError(ValueError):
    """The answer isn't of the shape that the other form could be made of."""


def convert(answer: Answer, encoding: Encoding) -> Answer:
    """Return the answer in that form.

    Raises:
        NotConvertibleError: it can't be made of this answer with certainty.
    """
    if answer.encoding == encoding:
        return answer
    try:
        return _as_body(answer) if encoding == Encoding.JSON else _as_events(answer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        raise NotConvertibleError(f"can't be made {encoding.name}: {exc!r}") from exc


class _Fields:
    """The fields of one of vLLM's objects.

    Args:
        names: in vLLM's order; those with a dash are null in all that can be converted.
    """

    def __init__(self, names: str) -> None:
        self.nulls: dict[str, Any] = dict.fromkeys(names.replace("-", "").split())
        self._may_be_set = frozenset(names.split())

    def read(self, value: Any) -> dict[str, Any]:
        """Return an object with all its fields.

        Raises:
            NotConvertibleError: it has others, or a value in one that should be null.
        """
        made: dict[str, Any] = self.nulls | value
        _expect(len(made) == len(self.nulls), "there are fields that vLLM doesn't have")
        for name in value.keys() - self._may_be_set:
            _expect(value[name] is None, "there is more than text")
        return made


_USAGE = _Fields(
    "prompt_tokens total_tokens completion_tokens prompt_tokens_details -completion_tokens_details"
)
_PROMPT_TOKENS = _Fields("cached_tokens created_cache_tokens multimodal_tokens")
_MESSAGE = _Fields("role content -refusal -annotations -audio -function_call -reasoning")
_COUNTS = _Fields("id object created model choices usage system_fingerprint -metrics")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kind:
    """How a kind of completion looks in either form."""

    body: _Fields
    choice: _Fields
    chunk: _Fields
    part: _Fields
    """A choice in a chunk."""
    logprobs: frozenset[str]
    objects: tuple[str, str]
    """The field `object` of bodies and of chunks."""


_CHAT = _Kind(
    body=_Fields(
        "id object created model choices -service_tier system_fingerprint usage -prompt_logprobs "
        "-prompt_token_ids -prompt_text -kv_transfer_params -ec_transfer_params -metrics"
    ),
    choice=_Fields("index message logprobs finish_reason stop_reason -token_ids -routed_experts"),
    chunk=_Fields(
        "id object created model choices -usage -system_fingerprint -prompt_token_ids -prompt_text "
        "-metrics"
    ),
    part=_Fields("index delta logprobs finish_reason stop_reason -token_ids"),
    logprobs=frozenset({"content"}),
    objects=("chat.completion", "chat.completion.chunk"),
)
_TEXT = _Kind(
    body=_Fields(
        "id object created model choices -service_tier system_fingerprint usage "
        "-kv_transfer_params -ec_transfer_params -metrics"
    ),
    choice=_Fields(
        "index text logprobs finish_reason stop_reason -token_ids -prompt_logprobs "
        "-prompt_token_ids -routed_experts"
    ),
    chunk=_Fields("id object created model choices -usage -system_fingerprint -metrics"),
    part=_Fields("index text logprobs finish_reason stop_reason -prompt_token_ids -token_ids"),
    logprobs=frozenset({"text_offset", "token_logprobs", "tokens", "top_logprobs"}),
    objects=("text_completion", "text_completion"),
)
_BY_BODY = {kind.objects[0]: kind for kind in (_CHAT, _TEXT)}
_BY_CHUNK = {kind.objects[1]: kind for kind in (_CHAT, _TEXT)}
_TOKEN = {"token", "logprob", "bytes", "top_logprobs"}
# What vLLM says in a body of a token whose probability it doesn't know; in a stream it says none.
_UNKNOWN_LOGPROB = -9999.0


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotConvertibleError(otherwise)


def _as_body(answer: Answer) -> Answer:
    *chunks, last = _chunks(answer.content + answer.trailer)
    counts = _COUNTS.read(last)
    model, called = counts["model"], counts["object"]
    kind = _BY_CHUNK[called]
    choices: dict[int, _Joined] = {}
    for chunk in chunks:
        said = kind.chunk.read(chunk)
        _expect((said["model"], said["object"]) == (model, called), "the events differ")
        (part,) = said["choices"]
        if (joined := choices.get(part["index"])) is None:
            joined = choices[part["index"]] = _Joined(kind)
        joined.add(kind.part.read(part))
    _expect(bool(choices) and counts["choices"] == [], "there is no choice, or one in the counts")
    body = kind.body.nulls | {
        "id": "",
        "object": kind.objects[0],
        "created": 0,
        "model": model,
        "choices": [choices[index].choice(index) for index in range(len(choices))],
        "system_fingerprint": counts["system_fingerprint"],
        "usage": _usage(counts["usage"]),
    }
    return Answer(Encoding.JSON, json_template(body))


class _Joined:
    """What the chunks say of a choice, joined."""

    def __init__(self, kind: _Kind) -> None:
        self._kind = kind
        self._role: str | None = None
        self._texts: list[str] = []
        self._logprobs: list[dict[str, list[Any]] | None] = []
        self._end: tuple[str, object] | None = None

    def add(self, part: dict[str, Any]) -> None:
        _expect(self._end is None, "a choice goes on after its end")
        reason, stop_reason = part["finish_reason"], part["stop_reason"]
        if self._kind is _CHAT:
            delta = part["delta"]
            if self._role is None:
                _expect(delta.keys() == {"role", "content"} and not delta["content"], "no role")
                _expect(part["logprobs"] is reason is stop_reason is None, "more than a role")
                self._role = _text(delta["role"])
                return
            _expect(delta.keys() <= {"content"}, "there is more than text")
            text = delta.get("content", "")
        else:
            text = part["text"]
        self._texts.append(_text(text))
        self._logprobs.append(_logprobs(part["logprobs"], self._kind))
        if reason is not None:
            self._end = _text(reason), stop_reason
        else:
            _expect(stop_reason is None, "it stops without an end")

    def choice(self, index: int) -> dict[str, Any]:
        """Return the choice as a body has it."""
        text = "".join(self._texts)
        reason, stop_reason = self._end or (_text(None), None)
        known = [said for said in self._logprobs if said is not None]
        _expect(len(known) in (0, len(self._logprobs)), "some tokens have no logprobs")
        made = self._kind.choice.nulls | {"index": index}
        if self._kind is _CHAT:
            made["message"] = _MESSAGE.nulls | {"role": self._role, "content": text}
        else:
            made["text"] = text
        if known:
            made["logprobs"] = {
                name: [one for said in known for one in said[name]] for name in known[0]
            }
        return made | {"finish_reason": reason, "stop_reason": stop_reason}


def _as_events(answer: Answer) -> Answer:
    parsed = _parse(answer.content)
    kind = _BY_BODY[parsed["object"]]
    body = kind.body.read(parsed)
    head = {"id": "", "object": kind.objects[1], "created": 0, "model": _text(body["model"])}
    choices = [kind.choice.read(choice) for choice in body["choices"]]
    _expect([each["index"] for each in choices] == list(range(len(choices))), "choices are missing")
    chunks = list(_chat_chunks(choices) if kind is _CHAT else _text_chunks(choices))
    *events, last = [sse_event(head | chunk) for chunk in chunks]
    usage = head | {"choices": [], "usage": _without_nulls(_usage(body["usage"]))}
    if body["system_fingerprint"] is not None:
        usage["system_fingerprint"] = _text(body["system_fingerprint"])
    return Answer(
        Encoding.SSE, b"".join([*events, with_fingerprint(last, usage)]), sse_event(usage)
    )


def _chat_chunks(choices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    messages = [_MESSAGE.read(choice["message"]) for choice in choices]
    for index, message in enumerate(messages):
        delta = {"role": _text(message["role"]), "content": ""}
        part = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        yield {"choices": [part], "prompt_token_ids": None, "prompt_text": None}
    for choice, message in zip(choices, messages, strict=True):
        delta = {"content": _text(message["content"])}
        ended = _ended(choice, _CHAT, "delta", delta)
        yield {"choices": [ended | {"token_ids": None}]}


def _text_chunks(choices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for choice in choices:
        ended = _ended(choice, _TEXT, "text", _text(choice["text"]))
        yield {"choices": [ended | {"prompt_token_ids": None, "token_ids": None}]}


def _ended(choice: dict[str, Any], kind: _Kind, name: str, said: Any) -> dict[str, Any]:
    return {
        "index": choice["index"],
        name: said,
        "logprobs": _logprobs(choice["logprobs"], kind),
        "finish_reason": _text(choice["finish_reason"]),
        "stop_reason": choice["stop_reason"],
    }


def _logprobs(said: Any, kind: _Kind) -> dict[str, list[Any]] | None:
    """Return the logprobs of a choice, if there is nothing in them that we don't know."""
    if said is None:
        return None
    _expect(said.keys() == kind.logprobs, "logprobs are not as we know them")
    _expect(all(isinstance(each, list) for each in said.values()), "logprobs are missing")
    for token in said.get("content", ()):
        _expect(token.keys() == _TOKEN, "a token is not as we know it")
        known = token["logprob"] != _UNKNOWN_LOGPROB or token["top_logprobs"]
        _expect(bool(known), "a token's probability is unknown")
    return dict(said)


def _usage(said: Any) -> dict[str, Any]:
    """Return token counts as a body has them."""
    usage = _USAGE.read(said)
    _expect(None not in list(usage.values())[:3], "there are no token counts")
    if usage["prompt_tokens_details"] is not None:
        usage["prompt_tokens_details"] = _PROMPT_TOKENS.read(usage["prompt_tokens_details"])
    return usage


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(each) if isinstance(each, dict) else each
        for name, each in value.items()
        if each is not None
    }


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise NotConvertibleError("there is no text where it should be")
    return value


def _chunks(events: bytes) -> list[Any]:
    """Return what events say that have nothing but data."""
    *parts, _ = events.split(b"\n\n")
    _expect(all(part.startswith(_DATA) for part in parts), "an event has more than data")
    return list(_parse(b"[" + b",".join(part[len(_DATA) :] for part in parts) + b"]"))


def _parse(content: bytes) -> Any:
    plain = content.replace(_MARKS["id"], b'""').replace(CREATED, b"0")
    return orjson.loads(strip_usage_marks(plain, wants_usage=True))
