"""Where a request that passes through goes: to the engine of the model that it names.

That is the `model` of a JSON body, of a form (RFC 7578), or else of the query. Bodies that have to
be read for it are read whole, within `server.max_body_bytes`; with one model under one name there
is nothing to choose, and nothing is read.
"""

import asyncio
import json
import re
from typing import Any, NamedTuple

import orjson
from aiohttp import hdrs

from server.cache_field import BadRequestError
from server.http_request import HttpRequest
from server.names import Named, Names

# Above, looking at a body would stop all others for too long.
_INLINE_BYTES = 64 * 1024
_FORM = "multipart/form-data"
_boundary = re.compile(r'(?i)boundary="?([^";,]{1,70})"?').search
_is_model = re.compile(rb'(?im)^content-disposition:\s*form-data\s*;\s*name="?model"?\s*$').search
_BLANK = b"\r\n\r\n"


class Destination(NamedTuple):
    """Where a request goes."""

    named: Named
    body: bytes | None
    """Its body with the name by which the engine knows the model; `None` if it wasn't read."""


async def destination(http: HttpRequest, names: Names) -> Destination:
    """Return where `http` goes.

    Raises:
        UnknownModelError: it names a model that there isn't.
        BadRequestError: its body is too odd for the model to be named as the engine knows it.
    """
    if names.are_one:
        return Destination(names.first, None)
    content_type = http.headers.get(hdrs.CONTENT_TYPE, "")
    media_type = content_type.partition(";")[0].strip().lower()
    boundary = _boundary(content_type) if media_type == _FORM else None
    asked = http.query.get("model") if "?" in http.raw_path else None
    if not http.body_exists or not (boundary or media_type.endswith("json")):
        return Destination(names.find(asked), None)
    body = await http.body()
    if len(body) <= _INLINE_BYTES:
        return _look(names, body, asked, boundary and boundary[1])
    return await asyncio.to_thread(_look, names, body, asked, boundary and boundary[1])


def _look(names: Names, body: bytes, asked: str | None, boundary: str | None) -> Destination:
    look = _in_json if boundary is None else _in_form
    found, renamed = look(names, body, boundary or "")
    return Destination(names.find(asked), body) if found is None else Destination(found, renamed)


def _in_json(names: Names, body: bytes, _: str) -> tuple[Named | None, bytes]:
    try:
        fields: Any = orjson.loads(body)
    except ValueError:
        # Engines take NaN and the like.
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return None, body
    if not isinstance(fields, dict) or not fields.get("model"):
        return None, body
    asked = fields["model"]
    named = names.find(asked)
    if isinstance(asked, str) and asked != named.name:
        try:
            # The slower way keeps every number as it is.
            body = json.dumps(json.loads(body) | {"model": named.name}).encode()
        except (ValueError, RecursionError) as exc:
            text = f"the body is nested too deeply, or has too long a number, to ask for {asked}"
            raise BadRequestError(text) from exc
    return named, body


def _in_form(names: Names, body: bytes, boundary: str) -> tuple[Named | None, bytes]:
    parts = body.split(b"--" + boundary.encode())
    for number, part in enumerate(parts):
        head, _, value = part.partition(_BLANK)
        if _is_model(head.replace(b"\r\n", b"\n")):
            named = names.find(value.removesuffix(b"\r\n").decode(errors="replace"))
            parts[number] = head + _BLANK + named.name.encode() + b"\r\n"
            return named, (b"--" + boundary.encode()).join(parts)
    return None, body
