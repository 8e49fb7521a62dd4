"""The admin API: the operations on tiers over HTTP. JSON, and errors in OpenAI's shape.

    GET    /stats
    GET    /entries?tier=&prefix=&label=&limit=&after=
    GET    /entries/KEY
    DELETE /entries/KEY
    POST   /purge          {"key" | "model" | "tenant" | "tag": NAME or [NAME, …]} or {"all": true}
    GET    /export         lines, as `server.admin.exports` describes them
    POST   /import         the same
    POST   /compact
    POST   /verify
    GET    /overview       as `server.pages.overview` describes it, of all tenants
    GET    /prefixes       the beginnings of prompts that engines are asked for most, as
                           `server.telemetry.prefixes` describes them
    GET    /config         the effective configuration, without secrets
    GET    /openapi.json   all this as `server.admin.api_document` describes it

It knows nothing of the listeners that it is reached by, and asks for no key: whom those let in may
do everything.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import orjson
from aiohttp import hdrs, web

from server.admin.lines import split
from server.admin.operations import MAX_PAGE, AdminError, Operations, Query
from server.protocol.labels import KINDS
from server.web.offload import offload
from server.web.request import HttpRequest
from server.web.responses import error_response, server_headers
from tiers.disk import MAX_KEY_BYTES
from tiers.purges.table import ALL, KEY

logger = logging.getLogger(__name__)

LINES = "application/jsonl"
_is_number = re.compile("[0-9]{1,9}").fullmatch
_Operation = Callable[[HttpRequest], Awaitable[Any]]
_ENTRIES = "/entries/"
# No thread goes on within a piece.
_PIECE_CHARACTERS = 64 * 1024


class Admin:
    """The handler of all requests to the admin API.

    Args:
        operations: what it offers.
        max_line_bytes: of an import; what is longer is damaged.
        server: what is told of the server itself, by path.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        max_line_bytes: int,
        server: Mapping[str, Callable[[], dict[str, Any]]] = MappingProxyType({}),
    ) -> None:
        self._operations, self._max_line_bytes = operations, max_line_bytes
        self._routes: dict[str, dict[str, _Operation]] = {
            "/stats": {"GET": lambda _: operations.stats()},
            "/entries": {"GET": self._page},
            _ENTRIES: {"GET": self._entry, "DELETE": self._delete},
            "/purge": {"POST": self._purge},
            "/export": {"GET": self._export},
            "/import": {"POST": self._import},
            "/compact": {"POST": lambda _: operations.compact()},
            "/verify": {"POST": lambda _: operations.verify()},
        }
        self._routes |= {path: {"GET": partial(_told, tell)} for path, tell in server.items()}

    async def answer(self, http: HttpRequest) -> web.StreamResponse:
        """Answer one request."""
        path = _ENTRIES if http.path.startswith(_ENTRIES) else http.path
        methods = self._routes.get(path)
        if methods is None:
            known = ", ".join(self._routes)
            return error_response(404, f"There is no such path; there are {known}.")
        operation = methods.get(http.method)
        if operation is None:
            allowed = ", ".join(methods)
            refused = error_response(405, f"The method should be {allowed}.")
            refused.headers["Allow"] = allowed
            return refused
        try:
            done = await operation(http)
        except AdminError as exc:
            return error_response(exc.status, str(exc), param=exc.param)
        if isinstance(done, web.StreamResponse):
            return done
        return web.Response(
            body=await offload(len(done.get("content", "")), _json, done),
            content_type="application/json",
            headers={hdrs.CACHE_CONTROL: "no-store"},
        )

    async def _page(self, http: HttpRequest) -> Any:
        given = http.query
        if unknown := sorted(given.keys() - set(Query._fields)):
            known = ", ".join(Query._fields)
            raise AdminError(400, f"There are only {known}, no {unknown[0]}.", param=unknown[0])
        limit = given.get("limit", str(Query().limit))
        if not (_is_number(limit) and 1 <= int(limit) <= MAX_PAGE):
            raise AdminError(400, f"limit should be from 1 to {MAX_PAGE}.", param="limit")
        texts = {name: text for name, text in given.items() if name != "limit"}
        for name, text in texts.items():
            if len(text.encode(errors="replace")) > 2 * MAX_KEY_BYTES:
                raise AdminError(400, f"{name} is too long.", param=name)
        _check_key(texts.get("prefix", ""), "prefix")
        return await self._operations.page(Query(limit=int(limit), **texts))

    async def _entry(self, http: HttpRequest) -> Any:
        return await self._operations.entry(_key(http))

    async def _delete(self, http: HttpRequest) -> Any:
        key = _key(http)
        await self._operations.entry(key)
        await self._operations.purge(KEY, [key])
        return web.Response(status=204)

    async def _purge(self, http: HttpRequest) -> Any:
        return {"purged": await self._operations.purge(*_named(await http.read_body()))}

    async def _export(self, http: HttpRequest) -> web.StreamResponse:
        lines = self._operations.export()
        # What can't be done at all is said before the response begins.
        first = await anext(lines)
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: LINES} | server_headers(http))
        await response.prepare(http)
        await http.write(response, first)
        try:
            async for line in lines:
                await http.write(response, line)
        except OSError as exc:
            logger.error("an export ended early: %s", exc)
            raise ConnectionResetError from exc
        await response.write_eof()
        return response

    async def _import(self, http: HttpRequest) -> Any:
        return await self._operations.take(split(http.iter_body(), self._max_line_bytes))


def _json(told: dict[str, Any]) -> bytes:
    if "content" not in told:
        return orjson.dumps(told) + b"\n"
    content = told["content"]
    starts = range(0, len(content), _PIECE_CHARACTERS)
    pieces = (orjson.dumps(content[at : at + _PIECE_CHARACTERS])[1:-1] for at in starts)
    rest = {name: value for name, value in told.items() if name != "content"}
    return b'%b,"content":"%b"}\n' % (orjson.dumps(rest)[:-1], b"".join(pieces))


async def _told(tell: Callable[[], dict[str, Any]], _: HttpRequest) -> Any:
    return tell()


def _key(http: HttpRequest) -> str:
    key = http.path.removeprefix(_ENTRIES)
    _check_key(key, "key")
    return key


def _check_key(key: str, param: str) -> None:
    # What isn't UTF-8 in a URL becomes something else in it.
    if len(key.encode(errors="replace")) > MAX_KEY_BYTES:
        raise AdminError(400, f"{param} should have at most {MAX_KEY_BYTES} bytes.", param=param)


def _named(raw: bytes) -> tuple[str, list[str]]:
    """Return the kind of label that a body is about, and the names.

    Raises:
        AdminError: it isn't as it should be.
    """
    should = f"The body should be an object with one of {', '.join((*KINDS, ALL))}."
    try:
        body = orjson.loads(raw)
    except ValueError as exc:
        raise AdminError(400, should) from exc
    if not isinstance(body, dict) or len(body) != 1:
        raise AdminError(400, should)
    ((kind, given),) = body.items()
    if kind == ALL:
        if given is not True:
            raise AdminError(400, "all should be true.", param=ALL)
        return ALL, []
    if kind not in KINDS:
        raise AdminError(400, should, param=kind)
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise AdminError(400, f"{kind} should be text, or a list of such.", param=kind)
    return kind, names
