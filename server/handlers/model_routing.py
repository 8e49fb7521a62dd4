"""Where a request that passes through goes, and what it is sent as: its body is read once for both.

It goes to the engine of the model that it names: that is the `model` of a JSON body, of a form (RFC
7578), or else of the query. With one model under one name there is nothing to choose. An engine
must know the model by its own name, have no more prompts than one request may (see
`server.protocol.bodies`), and keep tenants apart (`server.protocol.cache_salt`). A body that must
be read for any of this is read whole, within `server.max_body_bytes`; all others are passed on as
they come.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from aiohttp import hdrs

from server.auth.tenants import Tenant
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
    """Where a request goes."""

    named: ResolvedModel
    body: bytes | None
    """Its body as the engine may be sent it; `None` if it wasn't read."""
    id: Any = None
    """What its client calls it in a JSON body that was read."""


async def route_to_model(http: HttpRequest, names: ModelNames, max_prompts: int) -> RoutedRequest:
    """Return where `http` goes.

    Raises:
        UnknownModelError: it names a model that there isn't.
        BadRequestError: its body has too many prompts, asks for what isn't its tenant's, or is too
            odd to be changed as it must be.
    """
    is_form = http.media_type == _FORM
    boundary = _boundary(http.headers[hdrs.CONTENT_TYPE]) if is_form else None
    asked = http.query.get("model") if "?" in http.raw_path else None
    look: Callable[[bytes], RoutedRequest]
    route = route_of(http.path)
    if http.body_exists and (route.salted or route.counts_prompts):
        look = partial(_prompted, names, asked, route, http.tenant, max_prompts)
    elif names.is_single or not http.body_exists:
        return RoutedRequest(_named(names, asked), None)
    elif http.media_type.endswith("json"):
        look = partial(_in_json, names, asked)
    elif boundary is not None:
        look = partial(_in_form, names, asked, boundary[1].encode())
    else:
        return RoutedRequest(names.resolve(asked), None)
    body = await http.read_body()
    return await offload(len(body), look, body)


def _named(names: ModelNames, asked: Any) -> ResolvedModel:
    return names.default if names.is_single else names.resolve(asked)


def _prompted(
    names: ModelNames,
    asked: str | None,
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
        return RoutedRequest(_named(names, asked), raw)
    count_prompts(fields, is_conversation=route.is_conversation).check(max_prompts)
    named, raw, fields = _renamed(names, asked, raw, fields)
    if is_salted:
        raw, _ = with_cache_salt(raw, fields, tenant)
    return RoutedRequest(named, raw, fields.get("request_id"))


def _in_json(names: ModelNames, asked: str | None, raw: bytes) -> RoutedRequest:
    raw, fields = read_leniently(raw)
    if not isinstance(fields, dict):
        return RoutedRequest(_named(names, asked), raw)
    named, raw, fields = _renamed(names, asked, raw, fields)
    return RoutedRequest(named, raw, fields.get("request_id"))


def _renamed(
    names: ModelNames, asked: str | None, raw: bytes, fields: dict[str, Any]
) -> tuple[ResolvedModel, bytes, dict[str, Any]]:
    """Return whom a body is for, and both its forms with the model as the engine knows it."""
    model = fields.get("model")
    if names.is_single or not model:
        return _named(names, asked), raw, fields
    named = names.resolve(model)
    if isinstance(model, str) and model != named.name:
        fields = fields | {"model": named.name}
        raw = write_leniently(fields)
    return named, raw, fields


def _in_form(names: ModelNames, asked: str | None, boundary: bytes, body: bytes) -> RoutedRequest:
    parts = body.split(b"--" + boundary)
    for number, part in enumerate(parts):
        head, _, value = part.partition(_BLANK)
        if _is_model(head.replace(b"\r\n", b"\n")):
            named = names.resolve(value.removesuffix(b"\r\n").decode(errors="replace"))
            parts[number] = head + _BLANK + named.name.encode() + b"\r\n"
            return RoutedRequest(named, (b"--" + boundary).join(parts))
    return RoutedRequest(names.resolve(asked), body)
