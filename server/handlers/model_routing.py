"""Finds the model of a request that is proxied, and changes the request's body for its engine.

The model is the `model` of a JSON body, of a form (RFC 7578), or else of the query. With one model
under one name there is no choice. The engine must get its own name of the model, no more prompts
than one request may have (`server.protocol.bodies`), and a salt that keeps tenants apart
(`server.protocol.cache_salt`). A body that must be read for any of this is read whole, within
`server.max_body_bytes`. Others are streamed.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from aiohttp import hdrs

from server.auth.tenant import Tenant
from server.protocol.bodies import count_prompts, read_leniently, write_leniently
from server.protocol.cache_salt import with_cache_salt
from server.protocol.errors import BadRequestError
from server.protocol.model_names import ModelNames, ResolvedModel
from server.protocol.routes import Route, route_of
from server.web.offload import offload
from server.web.request import HttpRequest

_FORM = "multipart/form-data"
_boundary = re.compile(r'(?i)boundary="?([^";,]{1,70})"?').search
_is_model = re.compile(rb'(?im)^content-disposition:\s*form-data\s*;\s*name="?model"?\s*$').search
_BLANK = b"\r\n\r\n"


class RoutedRequest(NamedTuple):
    """A request's model, and its body for the engine."""

    model: ResolvedModel
    body: bytes | None
    """The body for the engine; `None` if it wasn't read."""
    id: Any = None
    """The `request_id` of a JSON body that was read."""


async def route_to_model(http: HttpRequest, names: ModelNames, max_prompts: int) -> RoutedRequest:
    """Find the model of a request, and change its body for the engine.

    Raises:
        UnknownModelError: the model does not exist.
        BadRequestError: the body has too many prompts or a field that its tenant may not use, or
            it can't be changed.
    """
    is_form = http.media_type == _FORM
    boundary = _boundary(http.headers[hdrs.CONTENT_TYPE]) if is_form else None
    query_model = http.query.get("model") if "?" in http.raw_path else None
    find: Callable[[bytes], RoutedRequest]
    route = route_of(http.path)
    if http.body_exists and route.counts_prompts:
        find = partial(_in_prompts, names, query_model, route, http.tenant, max_prompts)
    elif names.is_single or not http.body_exists:
        return RoutedRequest(_resolve_default(names, query_model), None)
    elif http.media_type.endswith("json"):
        find = partial(_in_json, names, query_model)
    elif boundary is not None:
        find = partial(_in_form, names, query_model, boundary[1].encode())
    else:
        return RoutedRequest(names.resolve(query_model), None)
    body = await http.read_body()
    return await offload(len(body), find, body)


def _resolve_default(names: ModelNames, query_model: Any) -> ResolvedModel:
    return names.default if names.is_single else names.resolve(query_model)


def _in_prompts(
    names: ModelNames,
    query_model: str | None,
    route: Route,
    tenant: Tenant,
    max_prompts: int,
    raw: bytes,
) -> RoutedRequest:
    raw, fields = read_leniently(raw)
    is_salted = route.salted and tenant.salt is not None
    if not isinstance(fields, dict):
        if fields is None and is_salted:
            raise BadRequestError("the body should be JSON", "body")
        return RoutedRequest(_resolve_default(names, query_model), raw)
    count_prompts(fields, is_conversation=route.is_conversation).check(max_prompts)
    resolved, raw, fields = _with_engine_name(names, query_model, raw, fields)
    if is_salted:
        raw, _ = with_cache_salt(raw, fields, tenant)
    return RoutedRequest(resolved, raw, fields.get("request_id"))


def _in_json(names: ModelNames, query_model: str | None, raw: bytes) -> RoutedRequest:
    raw, fields = read_leniently(raw)
    if not isinstance(fields, dict):
        return RoutedRequest(_resolve_default(names, query_model), raw)
    resolved, raw, fields = _with_engine_name(names, query_model, raw, fields)
    return RoutedRequest(resolved, raw, fields.get("request_id"))


def _with_engine_name(
    names: ModelNames, query_model: str | None, raw: bytes, fields: dict[str, Any]
) -> tuple[ResolvedModel, bytes, dict[str, Any]]:
    """Return a body's model, and the body and its fields with the engine's name of that model."""
    model = fields.get("model")
    if names.is_single or not model:
        return _resolve_default(names, query_model), raw, fields
    resolved = names.resolve(model)
    if isinstance(model, str) and model != resolved.name:
        fields = fields | {"model": resolved.name}
        raw = write_leniently(fields)
    return resolved, raw, fields


def _in_form(
    names: ModelNames, query_model: str | None, boundary: bytes, body: bytes
) -> RoutedRequest:
    parts = body.split(b"--" + boundary)
    for number, part in enumerate(parts):
        head, _, value = part.partition(_BLANK)
        if _is_model(head.replace(b"\r\n", b"\n")):
            resolved = names.resolve(value.removesuffix(b"\r\n").decode(errors="replace"))
            parts[number] = head + _BLANK + resolved.name.encode() + b"\r\n"
            return RoutedRequest(resolved, (b"--" + boundary).join(parts))
    return RoutedRequest(names.resolve(query_model), body)
