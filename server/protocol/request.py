"""A request that may be cached: what it asks for, and the key of its answer.

A key is the digest of who may share the answer (the scope), of what gives it
(`server.engine.identity`), of the route, and of the canonical request: the parsed body, in which

- the fields at the top and those of each message are sorted, as are a `logit_bias`'s tokens, and
  numbers at the top and in a `logit_bias` that are whole are integers, but not beyond the range in
  which floats are exact, nor where vLLM takes no float: there it may refuse one and take the other;
- the model is named, the default one where the body names none;
- what changes no answer is left out: `stream` and `stream_options`, as far as either form of the
  answer makes the other, what the route calls irrelevant (`server.protocol.routes`), such as
  `user`, and what vLLM ignores within other fields (`server.protocol.messages`);
- what the route calls a default is left out, since vLLM takes it for the same as absence;
- `cache`, which is meant for us, is left out;

The query is no part of it, nor are headers: on these routes vLLM reads no query, and of headers
only those that say who asks, where and when it works, and in which format it reports its load.

Of an engine that we don't know (`ResolvedModel.is_vllm`) nothing is left out but `cache`, headers
that may change an answer (`server.handlers.upstream_headers`) are part of the key, and a request
with a query isn't kept.

Everything else is kept as it was sent: the order inside tools, JSON schemas and arguments, since
prompts are rendered from it; values of a type that the engine refuses or judges by itself; and
fields that we don't know, so a new field can never cause a wrong hit. Whitespace, escapes, and
the way in which a number is written don't outlive parsing. Of a field that is there twice the last
counts, as for vLLM. What isn't JSON by RFC 8259 (NaN), what isn't text (lone surrogates), and what
is nested too deeply has no key: it is refused.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from multidict import MultiMapping, istr

from server.auth.tenants import Tenant
from server.protocol import cache_field
from server.protocol.cache_field import CacheField
from server.protocol.cache_salt import SALTED, with_cache_salt
from server.protocol.errors import BadRequestError
from server.protocol.formats import CHOICES, Encoding
from server.protocol.labels import labels_of
from server.protocol.model_names import ModelNames, ResolvedModel
from server.protocol.prompts import Prompts, prompts_in
from server.protocol.routes import CACHED_ROUTES, CachedRoute
from tiers import digest
from tiers.key import scoped

_INT64 = range(-(2**63), 2**63)
# Up to here every whole number is a float.
_EXACT = 2**53
_TAKES_NO_FLOAT = "thinking_token_budget"
_token = re.compile(r"0|[1-9][0-9]*").fullmatch
# orjson makes floats of integers beyond 64 bits, so two of them could share a key. They have 19
# digits or more, which are found like this ten times as fast as by a regular expression.
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_HUGE = b"0" * 19
_CONTINUOUS = "continuous_usage_stats"
_HOLD_PARTS = ("content", "file", "output", "source")
_NAME_OTHERS = ("file_id", "uuid")
_NAME_NOTHING = frozenset(
    {
        "cache_control", "content", "is_error", "name", "role", "signature", "text", "thinking",
        "tool_call_id", "tool_calls", "tool_use_id", "type",
    }
)  # fmt: skip
_CLIENTS_TOOLS = (None, "function", "custom", "namespace")
# Together they bound the bodies that are remembered, each up to three times, to 48 MiB.
_REMEMBERED = 1024
_REMEMBERED_BYTES = 16 * 1024


class ParsedRequest(NamedTuple):
    """One parsed request."""

    route: CachedRoute
    path: str
    """The one of the route's paths that it was asked by."""
    model: str
    """By which its engine knows it."""
    is_vllm: bool
    """Whether that is a vLLM of the version that we know."""
    id: Any
    """The `request_id` of the body, if there is one."""
    tenant: str
    """Who asks, by name."""
    labels: tuple[str, ...]
    """By what its answer may be purged, beside its key."""
    raw: bytes
    """The body as it was received, but with its model's own name, and without what is ours."""
    body: bytes
    """What the engine is to be sent."""
    encoding: Encoding
    wants_usage: bool
    deterministic: bool
    repeatable: bool
    """Whether the same request means the same tomorrow."""
    engine_would_keep: bool
    """Whether an engine that keeps answers itself would keep this one."""
    key: str
    cache: CacheField
    """What it says about caching, beside its headers."""
    prompts: Prompts


def parse_request(
    path: str,
    raw: bytes,
    tenant: Tenant,
    names: ModelNames,
    headers: tuple[tuple[str, str], ...] = (),
) -> ParsedRequest:
    """Parse a body and derive its key. A body that comes again byte for byte is remembered.

    Args:
        path: the request's, one of `CACHED_ROUTES`.
        raw: the body as received.
        tenant: who asks.
        names: what the model that it asks for is, and what gives its answers.
        headers: those that an engine is sent and that may change its answer, if we don't know it.

    Raises:
        BadRequestError: the body isn't a JSON object, or its field `cache` isn't as it should be.
        UnknownModelError: there is no model of that name.
    """
    size = len(raw)
    for _, value in headers:
        size += len(value)
    look = _remembered if size <= _REMEMBERED_BYTES else _parse
    return look(path, raw, tenant, names, headers)


def _parse(
    path: str, raw: bytes, tenant: Tenant, names: ModelNames, headers: tuple[tuple[str, str], ...]
) -> ParsedRequest:
    route = CACHED_ROUTES[path]
    raw, body = _read(raw)
    cache, sent_as_is = CacheField(), True
    if "cache" in body:
        cache, sent_as_is = cache_field.parse_cache_field(body.pop("cache")), False
    asked = body.get("model")
    named = names.resolve(asked)
    name = named.name
    if asked != name and isinstance(asked, str | None) and (asked or not route.needs_model):
        body["model"], sent_as_is = name, False
    if not sent_as_is:
        raw = _dumps(body)
    stream = route.streams and body.get("stream") is True
    options = body.get("stream_options") if route.format is CHOICES else None
    # How another engine is asked for token counts isn't known, so clients get those that it sends.
    wants_usage = stream and (
        not named.is_vllm
        or named.always_counts_tokens
        or (isinstance(options, dict) and options.get("include_usage") is True)
    )
    # An engine that we don't know may give any field a meaning.
    canonical: Mapping[str, Any] = dict(sorted(body.items()))
    if named.is_vllm:
        canonical = _canonical(
            route, body, stream=stream, wants_usage=wants_usage, apart=not named.encodings_agree
        )
        headers = ()
    said = [part.encode(errors="surrogateescape") for header in headers for part in header]
    key = digest(
        tenant.scope, named.identity.encode(), route.path.encode(), _dumps(canonical), *said
    )
    prompts = prompts_in(path, body)
    if path in SALTED:
        raw, body = with_cache_salt(raw, body, tenant)
    sent = raw
    if (
        named.is_vllm
        and route.format is CHOICES
        and stream
        and not wants_usage
        and isinstance(options, dict | None)
    ):
        # The count is recorded with every answer, and kept from clients that did not ask.
        counting = {k: v for k, v in (options or {}).items() if k != _CONTINUOUS}
        sent = _dumps(body | {"stream_options": counting | {"include_usage": True}})
    return ParsedRequest(
        route=route,
        path=path,
        model=name,
        is_vllm=named.is_vllm,
        id=body.get("request_id"),
        tenant=tenant.name,
        labels=labels_of(name, tenant.name, cache.tags),
        raw=raw,
        body=sent,
        encoding=Encoding.SSE if stream else Encoding.JSON,
        wants_usage=wants_usage,
        repeatable=not any(body.get(name) for name in route.unrepeatable)
        and not _points_elsewhere([body[name] for name in route.media if name in body])
        and not _runs_there(body.get("tools"))
        and _is_plain(options)
        and not _is_kept_elsewhere(route, named, body.get("store")),
        deterministic=route.deterministic
        or _is_zero(body.get("temperature"))
        or _is_seed(body.get("seed")),
        engine_would_keep=route.engine_may_keep and body.get("store") is not False,
        key=scoped(tenant.share_scope, key),
        cache=cache,
        prompts=prompts,
    )


_remembered = lru_cache(_REMEMBERED)(_parse)


def _read(raw: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a body in UTF-8, and what it says; engines take other encodings, and a BOM, too."""
    try:
        try:
            body = orjson.loads(raw)
        except ValueError:
            if (encoding := json.detect_encoding(raw)) == "utf-8":
                raise
            raw = raw.decode(encoding).encode()
            body = orjson.loads(raw)
        if _HUGE in raw.translate(_DIGITS_AS_ZEROS):
            body = json.loads(raw)
    except ValueError as exc:
        raise BadRequestError(f"the body should be JSON: {exc}", "body") from exc
    except RecursionError as exc:
        raise BadRequestError("the body is nested too deeply", "body") from exc
    if not isinstance(body, dict):
        raise BadRequestError("the body should be a JSON object", "body")
    return raw, body


def _canonical(
    route: CachedRoute, body: Mapping[str, Any], *, stream: bool, wants_usage: bool, apart: bool
) -> dict[str, Any]:
    fields = route.normalize(body)
    if route.streams and isinstance(fields.get("stream"), bool | None):
        fields.pop("stream", None)
    if stream and route.format is CHOICES and isinstance(body.get("stream_options"), dict | None):
        # Other options than these change the events.
        same = {"include_usage"} if wants_usage else {"include_usage", _CONTINUOUS}
        options = fields.pop("stream_options", None) or {}
        if other := {name: value for name, value in options.items() if name not in same and value}:
            fields["stream_options"] = other
    canonical = {}
    for name in sorted(fields):
        value = _plain(name, fields[name])
        if name in route.ignored and _is_ignored(value, route.ignored[name]):
            continue
        if name not in route.defaults or not _is_any_of(value, route.defaults[name]):
            canonical[name] = value
    if route.streams and (apart or not canonical.keys() <= route.same_in_both_encodings):
        # An odd value is the engine's to judge.
        canonical["stream"] = canonical.get("stream", stream)
    return canonical


def _plain(name: str, value: Any) -> Any:
    """Return what a field says, however it is written."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        is_whole = value.is_integer() and abs(value) <= _EXACT and name != _TAKES_NO_FLOAT
        return int(value) if is_whole else value
    # Of several spellings of one token's number vLLM takes the last, so there the order counts.
    if isinstance(value, dict) and name == "logit_bias" and all(map(_token, value)):
        return {token: _plain("", bias) for token, bias in sorted(value.items())}
    if isinstance(value, list) and name == "messages":
        return [dict(sorted(m.items())) if isinstance(m, dict) else m for m in value]
    return value


def _is_ignored(value: Any, types: type | tuple[type, ...]) -> bool:
    # A larger integer is refused.
    return isinstance(value, types) and (not isinstance(value, int) or value in _INT64)


def _is_any_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether a value is the same JSON as one of others; 1 isn't true there."""
    return any(type(value) is type(other) and value == other for other in others)


def _is_plain(options: Any) -> bool:
    """Whether we understand `stream_options` as an engine does, which takes 1 for true."""
    if not isinstance(options, dict):
        return options is None
    return all(isinstance(value, bool | None) for value in options.values())


def _points_elsewhere(prompts: list[Any]) -> bool:
    """Whether a part of one of the prompts names what is elsewhere and may change there.

    Parts are those of chat completions (`{"image_url": {"url": …}}`), Responses (`{"image_url":
    …}`, `file_id`, items that are known by an id alone) and Messages (`{"source": {"url": …}}`).
    With a `uuid` vLLM looks for media in its own cache.
    """
    rest = list(prompts)
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            # The rest of tokens are tokens, too.
            if not (value and isinstance(value[0], int)):
                rest += value
        elif isinstance(value, dict):
            if not value.keys() <= _NAME_NOTHING and _names_other(value):
                return True
            # Not the arguments of tools, in which anything may be named.
            for name in _HOLD_PARTS:
                if name in value:
                    rest.append(value[name])
    return False


def _names_other(part: dict[str, Any]) -> bool:
    if any(part.get(name) is not None for name in _NAME_OTHERS) or _is_reference(part):
        return True
    source = part.get("source")
    urls = [value for name, value in part.items() if name.endswith("_url")]
    if isinstance(source, dict) and "url" in source:
        urls.append(source)
    return not all(map(_is_sent_along, urls))


def _is_reference(item: dict[str, Any]) -> bool:
    """Whether an item of Responses stands for one that the engine keeps."""
    return "id" in item and item.keys() <= {"id", "type"}


def _is_sent_along(media: Any) -> bool:
    url = media.get("url") if isinstance(media, dict) else media
    return isinstance(url, str) and url.startswith("data:")


def _runs_there(tools: Any) -> bool:
    """Whether a tool is run by the engine, as a search is, and not by the client."""
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and tool.get("type") not in _CLIENTS_TOOLS for tool in tools
    )


def _is_kept_elsewhere(route: CachedRoute, named: ResolvedModel, store: Any) -> bool:
    """Whether an engine that we don't know may keep the answer, by the id that it gives it.

    OpenAI keeps Responses unless it is told not to, and other answers if it is told to.
    """
    return not named.is_vllm and store is not False and (route.engine_may_keep or bool(store))


def _dumps(value: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        # An integer beyond 64 bits, or deeper than orjson writes.
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except RecursionError as exc:
            raise BadRequestError("the body is nested too deeply", "body") from exc


def _is_seed(value: Any) -> bool:
    # vLLM takes -1 for none.
    return isinstance(value, int) and not isinstance(value, bool) and value != -1


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def key_headers(headers: MultiMapping[str]) -> tuple[tuple[str, str], ...]:
    """Return which of the headers are part of a key, with their values."""
    said: tuple[tuple[str, str], ...] = ()
    for name in KEY_HEADERS:
        if name in headers:
            # Whether an engine joins several, or takes the first, we don't know.
            said += tuple((name, value) for value in headers.getall(name))
    return said


KEY_HEADERS = tuple(
    map(
        istr,
        (
            "anthropic-beta", "anthropic-version", "openai-beta", "openai-organization",
            "openai-project",
        ),
    )
)  # fmt: skip
"""Headers that may change an answer, and are part of its key."""
