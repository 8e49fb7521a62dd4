"""Our OpenAPI document: an engine's own, corrected by what we add to its routes, and our routes.

An engine describes its routes itself: which of those it has whose answers are kept depends on its
model. Where an engine doesn't tell, or none can be asked, all of them are named.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from server.protocol.cache_field import SCHEMA
from server.protocol.routes import (
    REFUSED_PATHS,
    CachedRoute,
    Dialect,
    is_tenant_allowed,
    route_of,
)

_METHODS = frozenset({"delete", "get", "head", "options", "patch", "post", "put", "trace"})
_KEPT, _ENGINE, _OWN = "Answers that tiers keep", "Passed to the engine", "tierserve"
_JSON = "application/json"


class _Own(NamedTuple):
    summary: str
    media_type: str
    """Of its answer; empty where that has no body."""
    door: str
    """Who comes in where there are keys: `anybody`, `known`, `tenants`, or `operators`."""
    statuses: tuple[str, ...] = ()
    """With which it refuses beside those of its door."""
    is_resource: bool = False
    """Whether it has an ETag."""
    parameters: tuple[Mapping[str, Any], ...] = ()


_ODD = "it is not as OpenAPI has it"
# No engine's own.
_ERROR_NAME, _ANTHROPICS_NAME = "TierserveError", "TierserveMessagesError"
_DETAIL_NAME = "TierserveDetail"
ERROR: Mapping[str, Any] = {
    "type": "object",
    "description": "An error in OpenAI's shape",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string"]},
            },
        }
    },
}
"""The schema of our errors."""
_ANTHROPICS_ERROR = {
    "type": "object",
    "description": "An error in Anthropic's shape",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_DETAIL = {
    "type": "object",
    "description": "What an engine's framework says of a path, a method or a body it can't take",
    "required": ["detail"],
    "properties": {"detail": {}},
}
_STATUSES = {
    "400": "The request is wrong; `param` names the field",
    "401": "No key that is known",
    "403": "It takes an operator's key",
    "404": "There is no such path, model or response",
    "408": "The body did not come in time",
    "413": "The body is larger than server.max_body_bytes",
    "429": "More than the tenant's limits allow",
    "502": "The engine ended before its answer was complete",
    "503": "The engine is starting, down, or has too much to do",
    "504": "The engine did not answer in time, or no tier has what only-if-cached asks for",
}
_DOORS = {
    "anybody": (),
    "known": ("401",),
    "tenants": ("401", "429"),
    "operators": ("401", "403", "429"),
}
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
_RETRIED = frozenset({"429", "503"})
_WITH_BODY = frozenset({"patch", "post", "put"})
_ENGINES = ("404", "502", "503", "504")
_HEADERS = {
    "XRequestId": ("The request's id: the one that it came with, or a new one", "string"),
    "CacheStatus": ("Which tier answered, or why the engine was asked (RFC 9211)", "string"),
    "Age": ("Seconds since the answer was made", "integer"),
    "ETag": ("Of the answer in this form, where all of it was there when it was given", "string"),
    "RetryAfter": ("Seconds after which to try again", "integer"),
}
_CACHE_CONTROL = {
    "name": "Cache-Control",
    "in": "header",
    "description": "Which answers are taken (RFC 9111): no-cache, no-store, only-if-cached, "
    "max-age, min-fresh, max-stale",
    "schema": {"type": "string"},
    "example": "max-age=3600",
}
_IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The ETag of an answer that the client has; a tier's gets 304 if it is the same",
    "schema": {"type": "string"},
}
_MODEL = {
    "name": "model",
    "in": "query",
    "description": "The model that is meant",
    "schema": {"type": "string"},
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "An id of the client's for logs: 1 to 128 letters, digits, dots, dashes, "
    "underscores; another is replaced. Without it, such a `request_id` of the body is the id",
    "schema": {"type": "string"},
}


def document(
    engines: Sequence[Mapping[str, Any] | None],
    *,
    kept: Mapping[str, CachedRoute],
    version: str,
    has_keys: bool = False,
    open_metrics: bool = False,
) -> dict[str, Any]:
    """Return the document (OpenAPI 3.1).

    Args:
        engines: the documents of those that can be asked, `None` of one that tells none. Of all but
            the first the routes alone are taken whose answers are kept.
        kept: the routes whose answers are kept, by path, all of them by POST.
        version: of us.
        has_keys: whether only who has a key is answered.
        open_metrics: whether metrics are told without.

    Raises:
        ValueError: one of the engines' isn't a document.
    """
    engine = next((each for each in engines if each is not None), None)
    kept = _had(engines, kept)
    paths: dict[str, Any] = {}
    for path, method, operation in _operations(engine):
        paths.setdefault(path, {})[method] = _as_passed(
            path, method, operation, kept, has_keys=has_keys
        )
    summary = "Described by the engine, once it is ready"
    if engines:
        summary = "Another model's engine describes it"
    if None in engines:
        summary = "Not all engines tell what they have, so perhaps none has it"
    for path, route in kept.items():
        plain = _as_passed(path, "post", _plain(route, summary), kept, has_keys=has_keys)
        paths.setdefault(path, {}).setdefault("post", plain)
    for path, own in _OWNED.items():
        if not has_keys or (open_metrics and path.startswith("/metrics")):
            own = own._replace(door="anybody")
        paths[path] = {"get": _as_owned(path, own)}
    components = dict(_mapping((engine or {}).get("components", {})))
    components["schemas"] = {
        **_mapping(components.get("schemas", {})),
        _ERROR_NAME: ERROR,
        _ANTHROPICS_NAME: _ANTHROPICS_ERROR,
        _DETAIL_NAME: _DETAIL,
    }
    components["headers"] = dict(_mapping(components.get("headers", {}))) | {
        name: {"description": text, "schema": {"type": kind}}
        for name, (text, kind) in _HEADERS.items()
    }
    if has_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "tierserve", "version": version, "license": {"name": "Apache-2.0"}},
        "tags": [{"name": name} for name in (_KEPT, _ENGINE, _OWN)],
        "paths": paths,
        "components": components,
    }


def _had(
    engines: Sequence[Mapping[str, Any] | None], kept: Mapping[str, CachedRoute]
) -> Mapping[str, CachedRoute]:
    """Return the routes that one of the engines has; all, if that isn't known."""
    told = [_mapping(engine.get("paths", {})) for engine in engines if engine is not None]
    if not engines or len(told) < len(engines):
        return kept
    return {path: route for path, route in kept.items() if any(path in paths for paths in told)}


def _operations(engine: Mapping[str, Any] | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, item in _mapping((engine or {}).get("paths", {})).items():
        # We answer these ourselves, or refuse them whatever the engine says.
        if path not in _OWNED and path not in REFUSED_PATHS:
            for method, operation in _mapping(item).items():
                if method in _METHODS:
                    yield path, method, _mapping(operation)


def _as_passed(
    path: str, method: str, operation: Mapping[str, Any], kept: Collection[str], *, has_keys: bool
) -> dict[str, Any]:
    """Return an engine's operation with what we add to it."""
    is_kept = path in kept
    made = dict(operation, tags=[_KEPT if is_kept else _ENGINE])
    parameters = operation.get("parameters", [])
    if not isinstance(parameters, list):
        raise ValueError(_ODD)
    made["parameters"] = [*parameters, _REQUEST_ID]
    responses = dict(_mapping(operation.get("responses", {})))
    # FastAPI's own way to refuse a body, which vLLM does not use.
    responses.pop("422", None)
    # `?model=` may name one that there isn't, whatever the route.
    statuses = {"400", "404", "502", "503", "504"}
    if method in _WITH_BODY:
        statuses |= {"408", "413"}
    if has_keys:
        statuses |= {"401", "429"} if is_tenant_allowed(path) else {"401", "403", "429"}
        made["security"] = _SECURITY
    for status in statuses | {status for status in responses if status >= "400"}:
        said = _mapping(responses.get(status, {}))
        responses[status] = {**_refusal(status, path, passed=True), **_without_content(said)}
    if is_kept:
        made["parameters"] += [_CACHE_CONTROL, _IF_NONE_MATCH]
        responses["304"] = {"description": "The answer is the one that If-None-Match names"}
        made["requestBody"] = _with_cache_field(_mapping(operation.get("requestBody", {})))
    made["responses"] = {
        status: _with_headers(_mapping(response), is_kept=is_kept and status in ("200", "304"))
        for status, response in sorted(responses.items())
    }
    return made


def _with_cache_field(body: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(_mapping(body.get("content", {})))
    about = dict(_mapping(content.get(_JSON, {})))
    ours = {"type": "object", "properties": {"cache": SCHEMA}}
    about["schema"] = {"allOf": [about.get("schema", {}), ours]}
    return {**body, "content": {**content, _JSON: about}}


def _without_content(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an engine tells of an error, but for its shape: that is one of several."""
    return {name: part for name, part in response.items() if name != "content"}


def _with_headers(response: Mapping[str, Any], *, is_kept: bool) -> dict[str, Any]:
    names = {"X-Request-Id": "XRequestId"}
    if is_kept:
        names["Cache-Status"] = "CacheStatus"
        names["Age"] = "Age"
        names["ETag"] = "ETag"
    theirs = _mapping(response.get("headers", {}))
    return {**response, "headers": {**_header_references(names), **theirs}}


def _refusal(status: str, path: str = "", *, passed: bool = False) -> dict[str, Any]:
    """Return a response that is an error, whose shape an engine may have chosen if `passed`."""
    headers = _header_references({"Retry-After": "RetryAfter"} if status in _RETRIED else {})
    names = [_ERROR_NAME]
    if passed:
        names = [
            *([_ANTHROPICS_NAME] if route_of(path).dialect is Dialect.ANTHROPIC else []),
            _ERROR_NAME,
            _DETAIL_NAME,
        ]
    shapes = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    schema = {"anyOf": shapes} if passed else shapes[0]
    return {
        "description": _STATUSES.get(status, "The engine refuses it"),
        "headers": headers,
        "content": {_JSON: {"schema": schema}},
    }


def _header_references(names: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{at}"} for name, at in names.items()}


def _as_owned(path: str, own: _Own) -> dict[str, Any]:
    """Return an operation of ours."""
    schema = {"type": "object" if own.media_type == _JSON else "string"}
    content = {own.media_type: {"schema": schema}} if own.media_type else {}
    responses = {"200": {"description": own.summary, "content": content}}
    responses |= {status: _refusal(status) for status in (*_DOORS[own.door], *own.statuses)}
    parameters = [*own.parameters, _REQUEST_ID]
    if own.is_resource:
        responses["304"] = {"description": "The client has it, as If-None-Match says"}
        parameters.append(_IF_NONE_MATCH)
    made: dict[str, Any] = {
        "summary": own.summary,
        "operationId": "tierserve" + re.sub(r"\W+", "_", path),
        "tags": [_OWN],
        "parameters": parameters,
        "responses": {s: _with_headers(r, is_kept=False) for s, r in sorted(responses.items())},
    }
    return made if own.door == "anybody" else made | {"security": _SECURITY}


def _plain(route: CachedRoute, summary: str) -> dict[str, Any]:
    """Return a route that no engine describes."""
    content: dict[str, Any] = {_JSON: {"schema": {}}}
    if route.streams:
        content["text/event-stream"] = {}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": {"type": "object"}}}},
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(_ODD)
    return value


_OWNED: Mapping[str, _Own] = {
    "/": _Own("A page that shows what the tiers answer", "text/html", "anybody", is_resource=True),
    "/docs": _Own("This document as a page", "text/html", "anybody", is_resource=True),
    "/health": _Own("The process lives", "", "anybody"),
    "/metrics": _Own("Prometheus metrics", "text/plain", "operators"),
    "/metrics/engine": _Own(
        "The engine's own metrics", "text/plain", "operators", _ENGINES, parameters=(_MODEL,)
    ),
    "/openapi.json": _Own("This document", _JSON, "known", is_resource=True),
    "/overview": _Own("The engine's state, and who answered in the last day", _JSON, "known"),
    "/ready": _Own(
        "All engines answer, or that of a model",
        _JSON,
        "anybody",
        ("404", "503"),
        parameters=(_MODEL,),
    ),
    "/v1/models": _Own("The models, their aliases and adapters", _JSON, "tenants"),
    "/v1/models/{model}": _Own(
        "One of them",
        _JSON,
        "tenants",
        ("404",),
        parameters=(_MODEL | {"in": "path", "required": True},),
    ),
}
