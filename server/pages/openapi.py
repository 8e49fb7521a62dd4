"""Our OpenAPI document: an engine's own, extended by what we add to its routes, and our routes.

An engine describes its routes itself, since they depend on its model. Where an engine has no
document, or no engine is ready, all routes whose answers we store are listed.
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
from server.web.openapi_parts import (
    ANTHROPIC_ERROR,
    FASTAPI_ERROR,
    OBJECT,
    OPENAI_ERROR,
    TEXT,
    openapi_document,
)

_Document = Mapping[str, Any]

_METHODS = frozenset({"delete", "get", "head", "options", "patch", "post", "put", "trace"})
_METHODS_WITH_BODY = frozenset({"patch", "post", "put"})
_CACHED_TAG, _ENGINE_TAG, _OWN_TAG = "Cached routes", "Passed to the engine", "tierserve"
_JSON = "application/json"
_NOT_OPENAPI = "it is not as OpenAPI has it"
_STATUSES = {
    "400": "The request is wrong; `param` names the field",
    "401": "The key is missing or unknown",
    "403": "Only an operator's key allows this",
    "404": "There is no such path, model or response",
    "408": "The body did not arrive in time",
    "413": "The body is larger than server.max_body_bytes",
    "429": "The tenant's limits are exceeded",
    "502": "The engine failed before its answer was complete",
    "503": "The engine is starting, down or overloaded",
    "504": "The engine did not answer in time, or no tier has what only-if-cached asks for",
}
_RETRIED = frozenset({"429", "503"})
_ACCESS = {
    "anybody": (),
    "known": ("401",),
    "tenants": ("401", "429"),
    "operators": ("401", "403", "429"),
}
"""Who may use a route of ours where there are keys, and the statuses of those who may not."""
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
# No engine has schemas of these names.
_ERROR, _MESSAGES_ERROR, _DETAIL = "TierserveError", "TierserveMessagesError", "TierserveDetail"
_ERRORS = {_ERROR: OPENAI_ERROR, _MESSAGES_ERROR: ANTHROPIC_ERROR, _DETAIL: FASTAPI_ERROR}
_HEADERS = {
    "X-Request-Id": ("The request's id: the client's, or a new one", "string"),
    "Cache-Status": ("Which tier answered, or why the engine did (RFC 9211)", "string"),
    "Age": ("Seconds since the answer was generated", "integer"),
    "ETag": ("Identifies the answer in this encoding; absent while it is generated", "string"),
    "Retry-After": ("Seconds to wait before trying again", "integer"),
    "X-Tierserve-Fallback": (
        "The model that has answered in place of the one asked for; absent otherwise",
        "string",
    ),
}
_STORED_HEADERS = ("X-Request-Id", "Cache-Status", "Age", "ETag", "X-Tierserve-Fallback")


def _parameter(
    name: str, where: str, description: str, schema: Mapping[str, Any] = TEXT, **more: Any
) -> dict[str, Any]:
    return {"name": name, "in": where, "description": description, "schema": schema, **more}


_CACHE_CONTROL = _parameter(
    "Cache-Control",
    "header",
    "Which stored answers are accepted (RFC 9111): no-cache, no-store, only-if-cached, max-age, "
    "min-fresh, max-stale",
    example="max-age=3600",
)
_IF_NONE_MATCH = _parameter(
    "If-None-Match",
    "header",
    "The ETag of an answer that the client has; a tier answers 304 if it is the same",
)
_REQUEST_ID = _parameter(
    "X-Request-Id",
    "header",
    "The client's id for logs: 1 to 128 letters, digits, dots, dashes or underscores; any other is "
    "replaced. Without the header, a valid `request_id` of the body is used",
)
_MODEL = _parameter("model", "query", "A model's name")


class _OwnRoute(NamedTuple):
    """A GET route of ours."""

    summary: str
    media_type: str
    """Of its answer; empty where that has no body."""
    access: str
    """A key of `_ACCESS`."""
    statuses: tuple[str, ...] = ()
    """Its errors beside those of its access."""
    has_etag: bool = False
    parameters: tuple[Mapping[str, Any], ...] = ()


_ENGINE_STATUSES = ("404", "502", "503", "504")
_OWN_ROUTES: Mapping[str, _OwnRoute] = {
    "/": _OwnRoute("The overview page", "text/html", "anybody", has_etag=True),
    "/docs": _OwnRoute("This document as a page", "text/html", "anybody", has_etag=True),
    "/health": _OwnRoute("Answers 200 while the process runs", "", "anybody"),
    "/metrics": _OwnRoute("Prometheus metrics", "text/plain", "operators"),
    "/metrics/engine": _OwnRoute(
        "The engines' own metrics, with the labels `model` and `upstream`, or those of one model",
        "text/plain",
        "operators",
        ("404", "503"),
        parameters=(_MODEL,),
    ),
    "/openapi.json": _OwnRoute("This document", _JSON, "known", has_etag=True),
    "/overview": _OwnRoute(
        "State of the engines, and which tiers answered in the last 24 hours", _JSON, "known"
    ),
    "/ready": _OwnRoute(
        "Answers 200 while the server is ready by `server.ready`, or the engine of a model is",
        _JSON,
        "anybody",
        ("404", "503"),
        parameters=(_MODEL,),
    ),
    "/v1/models": _OwnRoute("The models, their aliases and adapters", _JSON, "tenants"),
    "/v1/models/{model}": _OwnRoute(
        "One model, alias or adapter",
        _JSON,
        "tenants",
        ("404",),
        parameters=(_MODEL | {"in": "path", "required": True},),
    ),
}


def build_document(
    engines: Sequence[_Document | None],
    *,
    kept: Mapping[str, CachedRoute],
    version: str,
    has_keys: bool = False,
    open_metrics: bool = False,
) -> dict[str, Any]:
    """Return the document (OpenAPI 3.1).

    Args:
        engines: the documents of the engines that are ready, `None` for one without a document. All
            but the first add only the routes whose answers are stored.
        kept: the routes whose answers are stored, by path, all of them by POST.
        version: of tierserve.
        has_keys: whether requests need a key.
        open_metrics: whether metrics need none.

    Raises:
        ValueError: one of the engines' isn't a document.
    """
    engine: _Document = next((each for each in engines if each is not None), {})
    kept = _available(engines, kept)
    paths: dict[str, Any] = {}
    for path, method, operation in _operations(engine):
        paths.setdefault(path, {})[method] = _extend(
            path, method, operation, kept, has_keys=has_keys
        )
    summary = _undescribed_summary(engines)
    for path, route in kept.items():
        plain = _extend(path, "post", _undescribed(route, summary), kept, has_keys=has_keys)
        paths.setdefault(path, {}).setdefault("post", plain)
    for path, own in _OWN_ROUTES.items():
        if not has_keys or (open_metrics and path.startswith("/metrics")):
            own = own._replace(access="anybody")
        paths[path] = {"get": _own_operation(path, own)}
    tags = [{"name": name} for name in (_CACHED_TAG, _ENGINE_TAG, _OWN_TAG)]
    components = _components(engine, has_keys=has_keys)
    return openapi_document("tierserve", version, tags=tags, paths=paths, components=components)


def _available(
    engines: Sequence[_Document | None], kept: Mapping[str, CachedRoute]
) -> Mapping[str, CachedRoute]:
    """Return the routes that one of the engines has; all, if that isn't known."""
    known = [_mapping(engine.get("paths", {})) for engine in engines if engine is not None]
    if not engines or len(known) < len(engines):
        return kept
    return {path: route for path, route in kept.items() if any(path in paths for paths in known)}


def _operations(engine: _Document) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield path, method and description of what is passed to an engine."""
    for path, item in _mapping(engine.get("paths", {})).items():
        # We answer our own paths, and always refuse to change adapters.
        if path not in _OWN_ROUTES and path not in REFUSED_PATHS:
            for method, operation in _mapping(item).items():
                if method in _METHODS:
                    yield path, method, _mapping(operation)


def _undescribed_summary(engines: Sequence[_Document | None]) -> str:
    if None in engines:
        return "Not all engines have a document, so perhaps none has this route"
    if engines:
        return "Another model's engine describes it"
    return "Described by the engine, once it is ready"


def _undescribed(route: CachedRoute, summary: str) -> dict[str, Any]:
    """Return the operation of a route that the first engine doesn't describe."""
    content: dict[str, Any] = {_JSON: {"schema": {}}}
    if route.streams:
        content["text/event-stream"] = {}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": OBJECT}}},
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def _components(engine: _Document, *, has_keys: bool) -> dict[str, Any]:
    components = dict(_mapping(engine.get("components", {})))
    components["schemas"] = {**_mapping(components.get("schemas", {})), **_ERRORS}
    components["headers"] = dict(_mapping(components.get("headers", {}))) | {
        _header_id(name): {"description": text, "schema": {"type": kind}}
        for name, (text, kind) in _HEADERS.items()
    }
    if has_keys:
        components["securitySchemes"] = _SECURITY_SCHEMES
    return components


def _extend(
    path: str, method: str, operation: Mapping[str, Any], kept: Collection[str], *, has_keys: bool
) -> dict[str, Any]:
    """Return an engine's operation with what we add to it."""
    is_kept = path in kept
    extended = dict(operation, tags=[_CACHED_TAG if is_kept else _ENGINE_TAG])
    parameters = operation.get("parameters", [])
    if not isinstance(parameters, list):
        raise ValueError(_NOT_OPENAPI)
    extended["parameters"] = [*parameters, _REQUEST_ID]
    responses = dict(_mapping(operation.get("responses", {})))
    # FastAPI adds it to all operations; vLLM answers 400 instead.
    responses.pop("422", None)
    if has_keys:
        extended["security"] = _SECURITY
    statuses = _statuses(path, method, has_keys=has_keys)
    for status in statuses | {status for status in responses if status >= "400"}:
        # The engine's description stays, but its schema is only one of several.
        described = {**_mapping(responses.get(status, {}))}
        described.pop("content", None)
        responses[status] = {**_error(status, _error_names(path)), **described}
    if is_kept:
        extended["parameters"] += [_CACHE_CONTROL, _IF_NONE_MATCH]
        responses["304"] = {"description": "The client has this answer, by its If-None-Match"}
        extended["requestBody"] = _with_cache_field(_mapping(operation.get("requestBody", {})))
    extended["responses"] = {
        status: _with_headers(
            _mapping(response),
            _STORED_HEADERS if is_kept and status in ("200", "304") else ("X-Request-Id",),
        )
        for status, response in sorted(responses.items())
    }
    return extended


def _statuses(path: str, method: str, *, has_keys: bool) -> set[str]:
    """Return the errors that any passed request may get."""
    # `?model=` may name an unknown model on any route.
    statuses = {"400", *_ENGINE_STATUSES}
    if method in _METHODS_WITH_BODY:
        statuses |= {"408", "413"}
    if has_keys:
        statuses |= {*_ACCESS["tenants" if is_tenant_allowed(path) else "operators"]}
    return statuses


def _with_cache_field(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's body with our field `cache`."""
    content = dict(_mapping(body.get("content", {})))
    json = dict(_mapping(content.get(_JSON, {})))
    ours = {"type": "object", "properties": {"cache": SCHEMA}}
    json["schema"] = {"allOf": [json.get("schema", {}), ours]}
    return {**body, "content": {**content, _JSON: json}}


def _error_names(path: str) -> list[str]:
    """Return the schemas that errors of an engine's path may have."""
    return [
        *([_MESSAGES_ERROR] if route_of(path).dialect is Dialect.ANTHROPIC else []),
        _ERROR,
        _DETAIL,
    ]


def _error(status: str, schemas: Sequence[str] = (_ERROR,)) -> dict[str, Any]:
    """Return the response of an error in one of these schemas."""
    references = [{"$ref": f"#/components/schemas/{name}"} for name in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    error = {
        "description": _STATUSES.get(status, "The engine refuses the request"),
        "content": {_JSON: {"schema": schema}},
    }
    return _with_headers(error, ["Retry-After"] if status in _RETRIED else [])


def _with_headers(response: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a response with headers of ours, unless it describes them itself."""
    ours = {name: {"$ref": f"#/components/headers/{_header_id(name)}"} for name in names}
    return {**response, "headers": {**ours, **_mapping(response.get("headers", {}))}}


def _header_id(name: str) -> str:
    return name.replace("-", "")


def _own_operation(path: str, own: _OwnRoute) -> dict[str, Any]:
    schema = {"type": "object" if own.media_type == _JSON else "string"}
    content = {own.media_type: {"schema": schema}} if own.media_type else {}
    responses = {"200": {"description": own.summary, "content": content}}
    responses |= {status: _error(status) for status in (*_ACCESS[own.access], *own.statuses)}
    parameters = [*own.parameters, _REQUEST_ID]
    if own.has_etag:
        responses["304"] = {"description": "The client has it, by its If-None-Match"}
        parameters.append(_IF_NONE_MATCH)
    operation: dict[str, Any] = {
        "summary": own.summary,
        "operationId": "tierserve" + re.sub(r"\W+", "_", path),
        "tags": [_OWN_TAG],
        "parameters": parameters,
        "responses": {
            status: _with_headers(response, ["X-Request-Id"])
            for status, response in sorted(responses.items())
        },
    }
    return operation if own.access == "anybody" else operation | {"security": _SECURITY}


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(_NOT_OPENAPI)
    return value
