"""A request that may be cached: what it asks for, and the key of its answer.

The canonical request is the parsed body without what can't change the answer, its own keys and
those of each message sorted. Everything else is kept as it was sent, the order inside tool and
JSON schemas included, since prompts are rendered from it; and so are fields that we don't know,
so a new field can never cause a wrong hit.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from server.labels import BadRequestError, labels_of
from tiers import Form, digest

# What vLLM answers alike in a body and in a stream. Of anything else it may leave out or refuse
# something in one of them, so there the form is part of the key.
_ALIKE_IN_BOTH_FORMS = frozenset(
    {
        "cache_salt", "chat_template_kwargs", "frequency_penalty", "ignore_eos", "logit_bias",
        "logprobs", "max_completion_tokens", "max_tokens", "messages", "metadata", "min_p",
        "min_tokens", "model", "n", "parallel_tool_calls", "presence_penalty", "priority", "prompt",
        "reasoning_effort", "repetition_penalty", "request_id", "response_format", "seed",
        "skip_special_tokens", "stop", "stop_token_ids", "stream", "stream_options",
        "structured_outputs", "temperature", "tool_choice", "tools", "top_k", "top_logprobs",
        "top_p", "user",
    }
)  # fmt: skip
# They name what exists at one moment only.
_UNREPEATABLE = ("kv_transfer_params", "ec_transfer_params")
_IRRELEVANT = frozenset({"stream", "user", "metadata", "request_id", "priority"})
_NULL_IS_ABSENT = frozenset(
    {
        "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "n",
        "presence_penalty", "response_format", "seed", "stop", "temperature", "top_p",
    }
)  # fmt: skip
# orjson makes floats of integers beyond 64 bits, so two of them could share a key.
_has_huge_integer = re.compile(rb"-[0-9]{19}|[0-9]{20}").search
_CONTINUOUS = "continuous_usage_stats"
# Together they bound the bodies that are remembered to 16 MiB.
_REMEMBERED = 1024
_REMEMBERED_BYTES = 16 * 1024


class Request(NamedTuple):
    """One parsed request: `route` is its path, `body` what the engine is to be sent."""

    route: str
    model: str
    labels: tuple[str, ...]
    """By what its answer may be purged, beside its key."""
    raw: bytes
    """The body as it was received, but for what is meant for us alone."""
    body: bytes
    form: Form
    wants_usage: bool
    deterministic: bool
    repeatable: bool
    """Whether the same request means the same tomorrow."""
    key: str


def parse(route: str, raw: bytes, scope: str, identity: str, default_model: str) -> Request:
    """Parse a body and derive its key. A body that comes again byte for byte is remembered.

    Args:
        route: the request's path.
        raw: the body as received.
        scope: who may share the answer.
        identity: which weights, engine and options give the answer.
        default_model: the model that a body without one means.

    Raises:
        BadRequestError: the body isn't a JSON object, or its field `cache` isn't as it should be.
    """
    look = _remembered if len(raw) <= _REMEMBERED_BYTES else _parse
    return look(route, raw, scope, identity, default_model)


def _parse(route: str, raw: bytes, scope: str, identity: str, default_model: str) -> Request:
    try:
        body = orjson.loads(raw)
        if _has_huge_integer(raw):
            body = json.loads(raw)
    except ValueError as exc:
        raise BadRequestError(f"the body should be JSON: {exc}") from exc
    except RecursionError as exc:
        raise BadRequestError("the body is nested too deeply") from exc
    if not isinstance(body, dict):
        raise BadRequestError("the body should be a JSON object")
    if "cache" in body:
        cache = body.pop("cache")
        raw = _dumps(body)
    else:
        cache = None
    stream = body.get("stream") is True
    options = body.get("stream_options")
    wants_usage = stream and isinstance(options, dict) and options.get("include_usage") is True
    canonical = _canonical(body, default_model, stream=stream, wants_usage=wants_usage)
    if not body.keys() <= _ALIKE_IN_BOTH_FORMS:
        canonical["stream"] = stream
    # A header may hold bytes that are no text.
    raw_scope = scope.encode(errors="surrogateescape")
    key = digest(raw_scope, identity.encode(), route.encode(), _dumps(canonical))
    model = str(canonical["model"])
    sent = raw
    if stream and not wants_usage and isinstance(options, dict | None):
        # The count is recorded with every answer, and kept from clients that did not ask.
        counting = {k: v for k, v in (options or {}).items() if k != _CONTINUOUS}
        sent = _dumps(body | {"stream_options": counting | {"include_usage": True}})
    return Request(
        route=route,
        model=model,
        labels=labels_of(model, raw_scope, cache),
        raw=raw,
        body=sent,
        form=Form.EVENTS if stream else Form.BODY,
        wants_usage=wants_usage,
        repeatable=not any(body.get(name) for name in _UNREPEATABLE)
        and not _names_remote_media(body.get("messages"))
        and _is_plain(options),
        deterministic=_is_zero(body.get("temperature")) or _is_seed(body.get("seed")),
        key=key,
    )


_remembered = lru_cache(_REMEMBERED)(_parse)


def _canonical(
    body: Mapping[str, Any], default_model: str, *, stream: bool, wants_usage: bool
) -> dict[str, Any]:
    canonical = {}
    for name in sorted(body):
        value = body[name]
        if name in _IRRELEVANT or (value is None and name in _NULL_IS_ABSENT):
            continue
        if name == "stream_options" and stream and isinstance(value, dict | None):
            # Other options than these change the events.
            same = {"include_usage"} if wants_usage else {"include_usage", _CONTINUOUS}
            value = {k: v for k, v in (value or {}).items() if k not in same and v}
            if not value:
                continue
        elif name == "messages" and isinstance(value, list):
            value = [dict(sorted(m.items())) if isinstance(m, dict) else m for m in value]
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        canonical[name] = value
    if body.get("model") in (None, ""):
        canonical["model"] = default_model
    if canonical.get("n") == 1:
        del canonical["n"]
    # An odd value of `stream` is the engine's to judge.
    if not isinstance(body.get("stream"), bool | None):
        canonical["stream"] = [body["stream"]]
    return canonical


def _is_plain(options: Any) -> bool:
    """Whether we understand `stream_options` as an engine does, which takes 1 for true."""
    if not isinstance(options, dict):
        return options is None
    return all(isinstance(value, bool | None) for value in options.values())


def _names_remote_media(messages: Any) -> bool:
    """Whether a message names media elsewhere, which may change there."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and any(map(_is_remote, part.items())):
                return True
    return False


def _is_remote(field: tuple[str, Any]) -> bool:
    name, value = field
    if not name.endswith("_url"):
        return False
    url = value.get("url") if isinstance(value, dict) else value
    return not (isinstance(url, str) and url.startswith("data:"))


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        # An integer beyond 64 bits, or deeper than orjson writes.
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except RecursionError as exc:
            raise BadRequestError("the body is nested too deeply") from exc


def _is_seed(value: Any) -> bool:
    # vLLM takes -1 for none.
    return isinstance(value, int) and not isinstance(value, bool) and value != -1


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0
