"""A request to a cached route: what it asks for, and the key of its answer.

A key is the digest of who may share the answer (the scope), of what generates it
(`server.engine.identity`), of the route, and of the canonical request: the parsed body, in which

- the fields at the top and those of each message are sorted, as are the tokens of a `logit_bias`,
  and whole numbers at the top and in a `logit_bias` are integers, but not beyond the range in which
  floats are exact, nor where vLLM takes no float: there it may refuse one and take the other;
- the model has its own name, the default model's where the body names none;
- what changes no answer is missing: `stream` and `stream_options`, as far as either encoding of the
  answer can be made of the other, the fields that the route ignores, such as `user`, and what vLLM
  ignores within other fields (`server.protocol.vllm_fields`);
- the route's defaults are missing, since vLLM takes absence for the same;
- `cache`, which is for us, is missing.

Neither the query nor headers are part of it: on these routes vLLM reads no query, and of headers
only those that identify the client, schedule the request, or choose the format of its load report.

For an engine that we don't know (not `ResolvedModel.is_vllm`) only `cache` is missing, the headers
`KEY_HEADERS` are part of the key, and answers to requests with a query aren't kept.

Everything else stays as it was sent: the order inside tools, JSON schemas and arguments, since
prompts are rendered from it; values of a type that the engine refuses or judges by itself; and
fields that we don't know, so that a new field can never cause a wrong hit. Whitespace, escapes, and
the way in which a number is written don't survive parsing. Of a field that stands twice the last
one counts, as for vLLM. What isn't JSON by RFC 8259 (NaN), what isn't text (lone surrogates), and
what is nested too deeply has no key: it is refused.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from multidict import MultiMapping, istr

from server.auth.tenant import Tenant
from server.protocol import bodies
from server.protocol.bodies import Prompts, count_prompts
from server.protocol.cache_field import CacheField, parse_cache_field
from server.protocol.cache_salt import with_cache_salt
from server.protocol.formats import CHOICES, Encoding
from server.protocol.labels import labels_of
from server.protocol.model_names import ModelNames, ResolvedModel
from server.protocol.routes import CACHED_ROUTES, CachedRoute
from server.protocol.vllm_fields import Types
from tiers import digest
from tiers.key import scoped

KEY_HEADERS = tuple(
    map(
        istr,
        (
            "anthropic-beta", "anthropic-version", "openai-beta", "openai-organization",
            "openai-project",
        ),
    )
)  # fmt: skip
"""Headers that may change the answer of an engine that we don't know."""
Headers = tuple[tuple[str, str], ...]
"""Names and values of headers."""

_INT64 = range(-(2**63), 2**63)
# Up to here every whole number is a float.
_EXACT = 2**53
_TAKES_NO_FLOAT = "thinking_token_budget"
_is_token = re.compile(r"0|[1-9][0-9]*").fullmatch
_OPTIONS, _USAGE, _CONTINUOUS = "stream_options", "include_usage", "continuous_usage_stats"
_NESTED_FIELDS = ("content", "file", "output", "source")
_REFERENCE_FIELDS = ("file_id", "uuid")
_PLAIN_FIELDS = frozenset(
    {
        "cache_control", "content", "is_error", "name", "role", "signature", "text", "thinking",
        "tool_call_id", "tool_calls", "tool_use_id", "type",
    }
)  # fmt: skip
_CLIENT_TOOLS = (None, "function", "custom", "namespace")


class ParsedRequest(NamedTuple):
    """One parsed request."""

    route: CachedRoute
    path: str
    """The one of the route's paths that the client asked."""
    model: str
    """The engine's name of the model."""
    is_vllm: bool
    """Whether the engine is a vLLM of the version that we know."""
    id: Any
    """The body's `request_id`; `None` if it has none."""
    tenant: str
    """The name of the tenant."""
    labels: tuple[str, ...]
    """The labels by which the answer may be purged, beside its key."""
    raw: bytes
    """The body as received, but with the model's own name, its tenant's salt and no `cache`."""
    body: bytes
    """The body for the engine where the answer is to be kept."""
    encoding: Encoding
    """In which the client asks for the answer."""
    wants_usage: bool
    """Whether the client asks for token counts at the end of a stream."""
    deterministic: bool
    """Whether the same request gets the same answer."""
    has_effect: bool
    """Whether an engine may do or keep more than the answer, or the request is for one engine."""
    repeatable: bool
    """Whether it has no effect, and the same request means the same tomorrow."""
    continues: str | None
    """The id of an answer that an engine keeps, and that the request goes on from."""
    engine_would_keep: bool
    """Whether an engine that keeps answers itself would keep this one."""
    key: str
    cache: CacheField
    """The body's field `cache`."""
    prompts: Prompts


def parse_request(
    path: str,
    raw: bytes,
    tenant: Tenant,
    names: ModelNames,
    headers: Headers = (),
    fallback: str | None = None,
) -> ParsedRequest:
    """Parse a body and derive the key of its answer.

    Args:
        path: the request's, one of `CACHED_ROUTES`.
        raw: the body as received.
        tenant: who asks.
        names: the models that there are, and what generates their answers.
        headers: the request's, as `key_headers` returns them.
        fallback: the name of the model that is to answer in place of the body's.

    Raises:
        BadRequestError: the body isn't a JSON object, or its field `cache` isn't as it should be.
        UnknownModelError: there is no model of that name.
    """
    route = CACHED_ROUTES[path]
    raw, body = bodies.read_object(raw)
    cache = parse_cache_field(body.get("cache"))
    model = names.resolve(body.get("model") if fallback is None else fallback)
    raw = _with_engine_name(raw, body, route, model)
    streams = route.streams and body.get("stream") is True
    wants_usage = streams and _wants_usage(route, body, model)
    canonical = _canonical_request(route, body, model, streams=streams, wants_usage=wants_usage)
    key = _digest(route, canonical, tenant, model, headers)
    prompts = count_prompts(body, is_conversation=route.is_conversation)
    continues = body.get("previous_response_id")
    if route.salted:
        raw, body = with_cache_salt(raw, body, tenant)
    has_effect = _has_effect(route, body, model)
    return ParsedRequest(
        route=route,
        path=path,
        model=model.name,
        is_vllm=model.is_vllm,
        id=body.get("request_id"),
        tenant=tenant.name,
        labels=labels_of(model.name, tenant.name, cache.tags or ()),
        raw=raw,
        body=raw if wants_usage or not streams else _with_usage(route, raw, body, model),
        encoding=Encoding.SSE if streams else Encoding.JSON,
        wants_usage=wants_usage,
        has_effect=has_effect,
        repeatable=not has_effect and _is_all_there(route, body),
        deterministic=route.deterministic or _is_greedy(body) or _has_seed(body),
        continues=continues if isinstance(continues, str) and continues else None,
        engine_would_keep=route.engine_may_keep and body.get("store") is not False,
        key=key,
        cache=cache,
        prompts=prompts,
    )


def key_headers(headers: MultiMapping[str]) -> Headers:
    """Return those of the headers that are part of a key, with their values."""
    found: Headers = ()
    for name in KEY_HEADERS:
        if name in headers:
            # We don't know whether an engine joins several, or takes the first.
            found += tuple((name, value) for value in headers.getall(name))
    return found


def _with_engine_name(
    raw: bytes, body: dict[str, Any], route: CachedRoute, model: ResolvedModel
) -> bytes:
    """Set the engine's name of the model in `body`, and remove `cache`; returns `body` as JSON.

    A `model` that vLLM refuses stays.
    """
    changed = "cache" in body
    body.pop("cache", None)
    asked = body.get("model")
    if asked != model.name and isinstance(asked, str | None) and (asked or not route.needs_model):
        body["model"], changed = model.name, True
    return bodies.write(body) if changed else raw


def _wants_usage(route: CachedRoute, body: Mapping[str, Any], model: ResolvedModel) -> bool:
    """Whether the client of a stream asks for token counts."""
    if not model.is_vllm or model.always_counts_tokens:
        # We don't know how another engine is asked for counts, so clients get those that it sends.
        return True
    options = body.get(_OPTIONS) if route.format is CHOICES else None
    return isinstance(options, dict) and options.get(_USAGE) is True


def _with_usage(
    route: CachedRoute, raw: bytes, body: Mapping[str, Any], model: ResolvedModel
) -> bytes:
    """Return the body of a request for a stream which asks for token counts, if vLLM takes that.

    Tiers keep the counts with every answer; clients that didn't ask for them don't get them.
    """
    options = body.get(_OPTIONS)
    if not (model.is_vllm and route.format is CHOICES and isinstance(options, dict | None)):
        return raw
    others = {name: value for name, value in (options or {}).items() if name != _CONTINUOUS}
    return bodies.write({**body, _OPTIONS: others | {_USAGE: True}})


def _digest(
    route: CachedRoute,
    canonical: Mapping[str, Any],
    tenant: Tenant,
    model: ResolvedModel,
    headers: Headers,
) -> str:
    if model.is_vllm:
        headers = ()
    parts = [part.encode(errors="surrogateescape") for header in headers for part in header]
    content = bodies.write(canonical)
    key = digest(tenant.scope, model.identity.encode(), route.path.encode(), content, *parts)
    return scoped(tenant.share_scope, key)


def _canonical_request(
    route: CachedRoute,
    body: Mapping[str, Any],
    model: ResolvedModel,
    *,
    streams: bool,
    wants_usage: bool,
) -> Mapping[str, Any]:
    """Return the fields of a body that may change its answer, sorted."""
    if not model.is_vllm:
        # An engine that we don't know may give any field a meaning.
        return dict(sorted(body.items()))
    fields = route.fields.normalize(body)
    if route.streams and isinstance(fields.get("stream"), bool | None):
        fields.pop("stream", None)
    if streams and route.format is CHOICES and isinstance(body.get(_OPTIONS), dict | None):
        _drop_usage_options(fields, wants_usage=wants_usage)
    canonical = {}
    for name in sorted(fields):
        value = _canonical_value(name, fields[name])
        if not _changes_nothing(route, name, value):
            canonical[name] = value
    same = route.fields.same_in_both_encodings
    if route.streams and not (model.encodings_agree and canonical.keys() <= same):
        # The engine decides about a value that isn't boolean.
        canonical["stream"] = canonical.get("stream", streams)
    return canonical


def _drop_usage_options(fields: dict[str, Any], *, wants_usage: bool) -> None:
    """Leave only those `stream_options` that change the events."""
    changes_nothing = {_USAGE} if wants_usage else {_USAGE, _CONTINUOUS}
    options = (fields.pop(_OPTIONS, None) or {}).items()
    if others := {name: value for name, value in options if name not in changes_nothing and value}:
        fields[_OPTIONS] = others


def _canonical_value(name: str, value: Any) -> Any:
    """Return a field's value in the one of its spellings that keys have."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        is_whole = value.is_integer() and abs(value) <= _EXACT and name != _TAKES_NO_FLOAT
        return int(value) if is_whole else value
    # Of several spellings of a token's number vLLM takes the last one, so there the order matters.
    if isinstance(value, dict) and name == "logit_bias" and all(map(_is_token, value)):
        return {token: _canonical_value("", bias) for token, bias in sorted(value.items())}
    if isinstance(value, list) and name == "messages":
        return [dict(sorted(m.items())) if isinstance(m, dict) else m for m in value]
    return value


def _changes_nothing(route: CachedRoute, name: str, value: Any) -> bool:
    """Whether the route ignores this field, or takes its absence for the same."""
    fields = route.fields
    return (name in fields.ignored and _is_ignored(value, fields.ignored[name])) or (
        name in fields.defaults and _is_any_of(value, fields.defaults[name])
    )


def _is_ignored(value: Any, types: Types) -> bool:
    # vLLM refuses a larger integer.
    return isinstance(value, types) and (not isinstance(value, int) or value in _INT64)


def _is_any_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether a value is the same JSON as one of the others; there 1 isn't true."""
    return any(type(value) is type(other) and value == other for other in others)


def _has_effect(route: CachedRoute, body: Mapping[str, Any], model: ResolvedModel) -> bool:
    """Whether a request may start work, run tools or be kept, or is about what one engine has."""
    return (
        any(body.get(name) for name in route.fields.unrepeatable)
        or _has_engine_tool(body.get("tools"))
        or _is_kept_elsewhere(route, model, body.get("store"))
    )


def _is_all_there(route: CachedRoute, body: Mapping[str, Any]) -> bool:
    """Whether a body has the whole meaning of its request, and we read it as an engine does."""
    media = [body[name] for name in route.fields.media if name in body]
    return not _refers_to_media_elsewhere(media) and (
        route.format is not CHOICES or _are_options_unambiguous(body.get(_OPTIONS))
    )


def _are_options_unambiguous(options: Any) -> bool:
    """Whether we read `stream_options` as an engine does, which takes 1 for true."""
    if not isinstance(options, dict):
        return options is None
    return all(isinstance(value, bool | None) for value in options.values())


def _refers_to_media_elsewhere(prompts: list[Any]) -> bool:
    """Whether a part of a prompt refers to media outside the request, which may change.

    Parts are those of chat completions (`{"image_url": {"url": …}}`), Responses (`{"image_url":
    …}`, `file_id`, items that are known by an id alone) and Messages (`{"source": {"url": …}}`).
    With a `uuid` vLLM looks for media in its own cache.
    """
    rest = list(prompts)
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            # After one token there are only tokens.
            if not (value and isinstance(value[0], int)):
                rest += value
        elif isinstance(value, dict):
            if not value.keys() <= _PLAIN_FIELDS and _refers_elsewhere(value):
                return True
            # The arguments of tools, which may name anything, aren't visited.
            for name in _NESTED_FIELDS:
                if name in value:
                    rest.append(value[name])
    return False


def _refers_elsewhere(part: dict[str, Any]) -> bool:
    if any(part.get(name) is not None for name in _REFERENCE_FIELDS) or _is_reference(part):
        return True
    source = part.get("source")
    urls = [value for name, value in part.items() if name.endswith("_url")]
    if isinstance(source, dict) and "url" in source:
        urls.append(source)
    return not all(map(_is_inline, urls))


def _is_reference(item: dict[str, Any]) -> bool:
    """Whether an item of Responses stands for one that the engine keeps."""
    return "id" in item and item.keys() <= {"id", "type"}


def _is_inline(media: Any) -> bool:
    url = media.get("url") if isinstance(media, dict) else media
    return isinstance(url, str) and url.startswith("data:")


def _has_engine_tool(tools: Any) -> bool:
    """Whether the engine runs one of the tools, such as a search, and not the client."""
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and tool.get("type") not in _CLIENT_TOOLS for tool in tools
    )


def _is_kept_elsewhere(route: CachedRoute, model: ResolvedModel, store: Any) -> bool:
    """Whether an engine that we don't know may keep the answer, under the id that it gives.

    OpenAI keeps Responses unless `store` is false, and other answers if it is true.
    """
    return not model.is_vllm and store is not False and (route.engine_may_keep or bool(store))


def _is_greedy(body: Mapping[str, Any]) -> bool:
    """Whether a request asks for the likeliest token each time."""
    value = body.get("temperature")
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _has_seed(body: Mapping[str, Any]) -> bool:
    value = body.get("seed")
    # vLLM takes -1 for none.
    return isinstance(value, int) and not isinstance(value, bool) and value != -1
