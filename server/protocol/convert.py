"""Conversion of answers: of a JSON body into a stream, and of a stream into a body.

It converts only what leaves nothing to guess: texts, in fields of vLLM 0.32 that are all known
here. Tool calls, reasoning and anything else can't be converted, since vLLM has one parser of them
for bodies and another for streams.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from server.protocol.formats import CREATED, Encoding
from server.protocol.template import (
    DATA,
    MARKS,
    json_template,
    sse_event,
    strip_usage_marks,
    with_fingerprint,
)
from tiers import Answer


class NotConvertibleError(ValueError):
    """The answer can't be converted with certainty."""


def convert(answer: Answer, encoding: Encoding) -> Answer:
    """Return the answer in that encoding.

    Raises:
        NotConvertibleError: this answer can't be converted with certainty.
    """
    if answer.encoding == encoding:
        return answer
    try:
        return _to_json(answer) if encoding == Encoding.JSON else _to_sse(answer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        raise NotConvertibleError(f"it can't be converted to {encoding.name}: {exc!r}") from exc


class _Fields:
    """The fields of one of vLLM's objects.

    Args:
        names: in vLLM's order. Those with a dash are null in all objects that can be converted.
    """

    def __init__(self, names: str) -> None:
        self.nulls: dict[str, Any] = dict.fromkeys(names.replace("-", "").split())
        self._may_be_set = frozenset(names.split())

    def read(self, value: Any) -> dict[str, Any]:
        """Return an object with all its fields.

        Raises:
            NotConvertibleError: it has others, or a value in one that should be null.
        """
        fields: dict[str, Any] = self.nulls | value
        _require(len(fields) == len(self.nulls), "there are fields that vLLM doesn't have")
        for name in value.keys() - self._may_be_set:
            _require(value[name] is None, "there is more than text")
        return fields


_USAGE = _Fields(
    "prompt_tokens total_tokens completion_tokens prompt_tokens_details -completion_tokens_details"
)
_PROMPT_TOKENS = _Fields("cached_tokens created_cache_tokens multimodal_tokens")
_MESSAGE = _Fields("role content -refusal -annotations -audio -function_call -reasoning")
_COUNTS = _Fields("id object created model choices usage system_fingerprint -metrics")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kind:
    """The fields of one kind of completion, in either encoding."""

    body: _Fields
    choice: _Fields
    chunk: _Fields
    part: _Fields
    """A choice in a chunk."""
    logprobs: frozenset[str]
    objects: tuple[str, str]
    """The values of the field `object` in bodies and in chunks."""


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
# In bodies, vLLM's value for a token whose probability it doesn't know; in streams it omits that.
_UNKNOWN_LOGPROB = -9999.0


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotConvertibleError(otherwise)


def _to_json(answer: Answer) -> Answer:
    *chunks, last = _chunks(answer.content + answer.trailer)
    counts = _COUNTS.read(last)
    model, object_ = counts["model"], counts["object"]
    kind = _BY_CHUNK[object_]
    choices: dict[int, _Joined] = {}
    for chunk in chunks:
        fields = kind.chunk.read(chunk)
        _require((fields["model"], fields["object"]) == (model, object_), "the events differ")
        (part,) = fields["choices"]
        if (joined := choices.get(part["index"])) is None:
            joined = choices[part["index"]] = _Joined(kind)
        joined.add(kind.part.read(part))
    _require(bool(choices) and counts["choices"] == [], "choices are missing, or in the counts")
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
    """A choice, joined from its parts in chunks."""

    def __init__(self, kind: _Kind) -> None:
        self._kind = kind
        self._role: str | None = None
        self._texts: list[str] = []
        self._logprobs: list[dict[str, list[Any]] | None] = []
        self._end: tuple[str, object] | None = None

    def add(self, part: dict[str, Any]) -> None:
        _require(self._end is None, "a choice goes on after its end")
        reason, stop_reason = part["finish_reason"], part["stop_reason"]
        if self._kind is _CHAT:
            delta = part["delta"]
            if self._role is None:
                _require(delta.keys() == {"role", "content"} and not delta["content"], "no role")
                _require(part["logprobs"] is reason is stop_reason is None, "more than a role")
                self._role = _text(delta["role"])
                return
            _require(delta.keys() <= {"content"}, "there is more than text")
            text = delta.get("content", "")
        else:
            text = part["text"]
        self._texts.append(_text(text))
        self._logprobs.append(_logprobs(part["logprobs"], self._kind))
        if reason is not None:
            self._end = _text(reason), stop_reason
        else:
            _require(stop_reason is None, "it stops without an end")

    def choice(self, index: int) -> dict[str, Any]:
        """Return the choice as a field of a body."""
        text = "".join(self._texts)
        reason, stop_reason = self._end or (_text(None), None)
        known = [logprobs for logprobs in self._logprobs if logprobs is not None]
        _require(len(known) in (0, len(self._logprobs)), "some tokens have no logprobs")
        choice = self._kind.choice.nulls | {"index": index}
        if self._kind is _CHAT:
            choice["message"] = _MESSAGE.nulls | {"role": self._role, "content": text}
        else:
            choice["text"] = text
        if known:
            choice["logprobs"] = {
                name: [token for logprobs in known for token in logprobs[name]] for name in known[0]
            }
        return choice | {"finish_reason": reason, "stop_reason": stop_reason}


def _to_sse(answer: Answer) -> Answer:
    parsed = _parse(answer.content)
    kind = _BY_BODY[parsed["object"]]
    body = kind.body.read(parsed)
    head = {"id": "", "object": kind.objects[1], "created": 0, "model": _text(body["model"])}
    choices = [kind.choice.read(choice) for choice in body["choices"]]
    _require(
        [each["index"] for each in choices] == list(range(len(choices))), "choices are missing"
    )
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
        part = _whole_part(choice, _CHAT, "delta", delta)
        yield {"choices": [part | {"token_ids": None}]}


def _text_chunks(choices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for choice in choices:
        part = _whole_part(choice, _TEXT, "text", _text(choice["text"]))
        yield {"choices": [part | {"prompt_token_ids": None, "token_ids": None}]}


def _whole_part(choice: dict[str, Any], kind: _Kind, name: str, text: Any) -> dict[str, Any]:
    """Return a choice as its only part that has text."""
    return {
        "index": choice["index"],
        name: text,
        "logprobs": _logprobs(choice["logprobs"], kind),
        "finish_reason": _text(choice["finish_reason"]),
        "stop_reason": choice["stop_reason"],
    }


def _logprobs(logprobs: Any, kind: _Kind) -> dict[str, list[Any]] | None:
    """Return the logprobs of a choice, if all of their fields are known."""
    if logprobs is None:
        return None
    _require(logprobs.keys() == kind.logprobs, "logprobs have other fields")
    _require(all(isinstance(each, list) for each in logprobs.values()), "logprobs are missing")
    for token in logprobs.get("content", ()):
        _require(token.keys() == _TOKEN, "a token has other fields")
        known = token["logprob"] != _UNKNOWN_LOGPROB or token["top_logprobs"]
        _require(bool(known), "a token's probability is unknown")
    return dict(logprobs)


def _usage(counts: Any) -> dict[str, Any]:
    """Return token counts as a field of a body."""
    usage = _USAGE.read(counts)
    _require(None not in list(usage.values())[:3], "there are no token counts")
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
        raise NotConvertibleError("a text is missing")
    return value


def _chunks(events: bytes) -> list[Any]:
    """Return the data of events that have nothing else."""
    *parts, _ = events.split(b"\n\n")
    _require(all(part.startswith(DATA) for part in parts), "an event has more than data")
    return list(_parse(b"[" + b",".join(part[len(DATA) :] for part in parts) + b"]"))


def _parse(content: bytes) -> Any:
    plain = content.replace(MARKS["id"], b'""').replace(CREATED, b"0")
    return orjson.loads(strip_usage_marks(plain, wants_usage=True))
