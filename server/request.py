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

from tiers import Form, digest

_IRRELEVANT = frozenset({"stream", "user", "metadata", "request_id", "priority"})
_NULL_IS_ABSENT = frozenset(
    {
        "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "n",
        "presence_penalty", "response_format", "seed", "stop", "temperature", "top_p",
    }
)  # fmt: skip
# orjson makes floats of integers beyond 64 bits, so two of them could share a key.
_has_huge_integer = re.compile(rb"-[0-9]{19}|[0-9]{20}").search
# Together they bound what is remembered to 16 MiB.
_REMEMBERED = 1024
_REMEMBERED_BYTES = 16 * 1024


class BadRequestError(ValueError):
    """The body can't be understood; the text says why."""


class Request(NamedTuple):
    """One parsed request: `route` is its path, `body` what the engine is to be sent."""

    route: str
    model: str
    body: bytes
    form: Form
    wants_usage: bool
    deterministic: bool
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
        BadRequestError: the body isn't a JSON object.
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
    stream = body.get("stream") is True
    options = body.get("stream_options")
    wants_usage = stream and isinstance(options, dict) and options.get("include_usage") is True
    canonical = _canonical(body, default_model, stream=stream)
    key = digest(scope.encode(), identity.encode(), route.encode(), _dumps(canonical))
    if stream and not wants_usage and isinstance(options, dict | None):
        # The count is recorded with every answer, and kept from clients that did not ask.
        raw = _dumps(body | {"stream_options": (options or {}) | {"include_usage": True}})
    return Request(
        route=route,
        model=str(canonical["model"]),
        body=raw,
        form=Form.EVENTS if stream else Form.BODY,
        wants_usage=wants_usage,
        deterministic=_is_zero(body.get("temperature")) or _is_int(body.get("seed")),
        key=key,
    )


_remembered = lru_cache(_REMEMBERED)(_parse)


def _canonical(body: Mapping[str, Any], default_model: str, *, stream: bool) -> dict[str, Any]:
    canonical = {}
    for name in sorted(body):
        value = body[name]
        if name in _IRRELEVANT or (value is None and name in _NULL_IS_ABSENT):
            continue
        if name == "stream_options" and stream and isinstance(value, dict | None):
            # Other options than this one change the events.
            value = {k: v for k, v in (value or {}).items() if k != "include_usage" and v}
            if not value:
                continue
        elif name == "messages" and isinstance(value, list):
            value = [dict(sorted(m.items())) if isinstance(m, dict) else m for m in value]
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        canonical[name] = value
    canonical["model"] = body.get("model") or default_model
    if canonical.get("n") == 1:
        del canonical["n"]
    # Not a boolean in the request: an odd value of `stream` is the engine's to judge.
    if body.get("stream") not in (None, True, False):
        canonical["stream"] = body["stream"]
    return canonical


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        # An integer beyond 64 bits, or deeper than orjson writes.
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except RecursionError as exc:
            raise BadRequestError("the body is nested too deeply") from exc


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0
