"""Routing a request that is proxied to the engine of its model, with its body read once for all.

The model is the `model` of a JSON body, of a form (RFC 7578), or else of the query. With one model
under one name there is no choice. The engine must get its own name of the model, no more prompts
than one request may have (`server.protocol.prompts`), and a salt that keeps tenants apart
(`server.protocol.cache_salt`). A body that must be read for any of this is read whole, within
`server.max_body_bytes`. Others are streamed.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import orjson
from aiohttp import hdrs

from server.protocol.cache_salt import SALTED, with_cache_salt
from server.protocol.errors import BadRequestError
from server.protocol.model_names import ModelNames, ResolvedModel
from server.protocol.prompts import prompts_in
from server.web.offload import offload
from server.web.request import HttpRequest

_WITH_PROMPTS = SALTED | {"/v1/completions/render"}
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
    if http.body_exists and http.path in _WITH_PROMPTS:
        find = partial(_in_prompts, names, query_model, http, max_prompts)
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
    names: ModelNames, query_model: str | None, http: HttpRequest, max_prompts: int, raw: bytes
) -> RoutedRequest:
    raw, fields = _parse(raw)
    is_salted = http.path in SALTED and http.tenant.salt is not None
    if not isinstance(fields, dict):
        if fields is None and is_salted:
            raise BadRequestError("the body should be JSON", "body")
        return RoutedRequest(_resolve_default(names, query_model), raw)
    prompts_in(http.path, fields).check(max_prompts)
    resolved, raw, fields = _with_engine_name(names, query_model, raw, fields)
    if is_salted:
        raw, _ = with_cache_salt(raw, fields, http.tenant)
    return RoutedRequest(resolved, raw, fields.get("request_id"))


def _in_json(names: ModelNames, query_model: str | None, raw: bytes) -> RoutedRequest:
    raw, fields = _parse(raw)
    if not isinstance(fields, dict):
        return RoutedRequest(_resolve_default(names, query_model), raw)
    resolved, raw, fields = _with_engine_name(names, query_model, raw, fields)
    return RoutedRequest(resolved, raw, fields.get("request_id"))


def _parse(raw: bytes) -> tuple[bytes, Any]:
    """Return a body and its parsed value: `None` for invalid JSON, which engines refuse."""
    try:
        return raw, orjson.loads(raw)
    except ValueError:
        pass
    try:
        # Engines accept NaN and the like, and other encodings.
        fields = json.loads(raw)
        return json.dumps(fields).encode(), fields
    except (ValueError, RecursionError):
        return raw, None


def _with_engine_name(
    names: ModelNames, query_model: str | None, raw: bytes, fields: dict[str, Any]
) -> tuple[ResolvedModel, bytes, dict[str, Any]]:
    """Return a body's model, and the body and its fields with the engine's name of that model."""
    model = fields.get("model")
    if names.is_single or not model:
        return _resolve_default(names, query_model), raw, fields
    resolved = names.resolve(model)
    if isinstance(model, str) and model != resolved.name:
        try:
            # `json` keeps every number as it is; orjson does not.
            fields = json.loads(raw) | {"model": resolved.name}
            raw = json.dumps(fields).encode()
        except (ValueError, RecursionError) as exc:
            text = f"the body is nested too deeply, or has too long a number, to ask for {model}"
            raise BadRequestError(text) from exc
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
