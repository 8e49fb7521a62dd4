"""The admin API: the operations over HTTP, with JSON bodies and errors in OpenAI's shape.

`server.admin.api_document` describes its paths, and serves as their reference. The handler checks
no key: every client that the listeners (`server.admin.sockets`) accept may do everything.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import orjson
from aiohttp import hdrs, web

from server.admin.audited import AuditedOperations
from server.admin.export_format import split_lines
from server.admin.operations import MAX_PAGE, AdminError, AdminOperations, EntryQuery
from server.audit.acts import Audit, AuditError
from server.protocol.labels import KINDS
from server.web.access import actor_of
from server.web.offload import offload
from server.web.request import HttpRequest
from server.web.responses import error_response, server_headers
from tiers.disk import MAX_KEY_BYTES
from tiers.purges.table import ALL, KEY

logger = logging.getLogger(__name__)

ADMIN = "admin"
"""Who uses the admin API, as the audit log has it."""
JSONL = "application/jsonl"
_is_number = re.compile("[0-9]{1,9}").fullmatch
_Operation = Callable[[HttpRequest], Awaitable[Any]]
Report = Callable[[], dict[str, Any]] | Callable[[], Awaitable[dict[str, Any]]]
"""Returns the JSON of a read-only path."""
_ENTRIES = "/entries/"
# The report that shows beginnings of prompts. A page asks for it every few seconds.
_PROMPTS = "/prefixes"
# orjson holds the GIL, so large contents are encoded in pieces.
_PIECE_CHARACTERS = 64 * 1024


class AdminHandler:
    """The handler of all requests to the admin API.

    Args:
        operations: does what the requests ask for.
        audit: records what they change, and what shows answers and prompts.
        max_line_bytes: the longest line of an import; longer lines are cut, and so damaged.
        reports: further read-only paths, each with a function that returns its JSON.
    """

    def __init__(
        self,
        operations: AdminOperations,
        audit: Audit,
        *,
        max_line_bytes: int,
        reports: Mapping[str, Report] = MappingProxyType({}),
    ) -> None:
        self._operations, self._audit = operations, audit
        self._max_line_bytes = max_line_bytes
        self._routes: dict[str, dict[str, _Operation]] = {
            "/stats": {"GET": lambda _: operations.stats()},
            "/entries": {"GET": self._page},
            _ENTRIES: {"GET": self._entry, "DELETE": self._delete},
            "/chains": {"GET": self._chains},
            "/purge": {"POST": self._purge},
            "/export": {"GET": self._export},
            "/import": {"POST": self._import},
            "/compact": {"POST": lambda http: self._recorded(http).compact()},
            "/verify": {"POST": lambda _: operations.verify()},
        }
        self._routes |= {path: {"GET": self._reporting(report)} for path, report in reports.items()}

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
            answer = await operation(http)
        except AdminError as exc:
            return error_response(exc.status, str(exc), param=exc.param)
        except AuditError as exc:
            return error_response(503, str(exc))
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.Response(
            body=await offload(len(answer.get("content", "")), _encode_json, answer),
            content_type="application/json",
            headers={hdrs.CACHE_CONTROL: "no-store"},
        )

    def _recorded(self, http: HttpRequest) -> AdminOperations:
        if not self._audit.is_on:
            return self._operations
        return AuditedOperations(self._operations, self._audit, actor_of(http, ADMIN))

    async def _page(self, http: HttpRequest) -> Any:
        return await self._operations.page(_parse_query(http.query))

    async def _chains(self, http: HttpRequest) -> Any:
        query = _parse_query(http.query, ("limit", "label"))
        return await self._operations.chains(query.limit, query.label)

    async def _entry(self, http: HttpRequest) -> Any:
        return await self._recorded(http).entry(_parse_key(http))

    async def _delete(self, http: HttpRequest) -> Any:
        key = _parse_key(http)
        await self._operations.entry(key)
        await self._recorded(http).purge(KEY, [key])
        return web.Response(status=204)

    async def _purge(self, http: HttpRequest) -> Any:
        kind, names = _parse_purge(await http.read_body())
        return {"purged": await self._recorded(http).purge(kind, names)}

    async def _export(self, http: HttpRequest) -> web.StreamResponse:
        async with aclosing(self._recorded(http).export()) as lines:
            # An export that can't begin raises here, when an error can still be sent.
            first = await anext(lines)
            response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: JSONL} | server_headers(http))
            await response.prepare(http)
            await http.write(response, first)
            try:
                async for line in lines:
                    await http.write(response, line)
            except OSError as exc:
                logger.error("an export failed before its end: %s", exc)
                raise ConnectionResetError from exc
        await response.write_eof()
        return response

    async def _import(self, http: HttpRequest) -> Any:
        lines = split_lines(http.iter_body(), self._max_line_bytes)
        return await self._recorded(http).import_(lines)

    def _reporting(self, report: Report) -> _Operation:
        async def operation(http: HttpRequest) -> Any:
            if http.path == _PROMPTS and self._audit.is_on:
                self._audit.count("show_prompts", actor_of(http, ADMIN), _PROMPTS)
            reported = report()
            return await reported if isinstance(reported, Awaitable) else reported

        return operation


def _encode_json(answer: dict[str, Any]) -> bytes:
    if "content" not in answer:
        return orjson.dumps(answer) + b"\n"
    content = answer["content"]
    starts = range(0, len(content), _PIECE_CHARACTERS)
    pieces = (orjson.dumps(content[at : at + _PIECE_CHARACTERS])[1:-1] for at in starts)
    rest = {name: value for name, value in answer.items() if name != "content"}
    return b'%b,"content":"%b"}\n' % (orjson.dumps(rest)[:-1], b"".join(pieces))


def _parse_query(
    params: Mapping[str, str], known: Sequence[str] = EntryQuery._fields
) -> EntryQuery:
    """Return the query that a URL's parameters describe, which have `known` names.

    Raises:
        AdminError: a parameter is wrong.
    """
    if unknown := sorted(params.keys() - set(known)):
        only = f"There are only {', '.join(known)}, no {unknown[0]}."
        raise AdminError(400, only, param=unknown[0])
    limit = params.get("limit", str(EntryQuery().limit))
    if not (_is_number(limit) and 1 <= int(limit) <= MAX_PAGE):
        raise AdminError(400, f"limit should be from 1 to {MAX_PAGE}.", param="limit")
    texts = {name: text for name, text in params.items() if name != "limit"}
    for name, text in texts.items():
        if _size(text) > 2 * MAX_KEY_BYTES:
            raise AdminError(400, f"{name} is too long.", param=name)
    _check_key(texts.get("prefix", ""), "prefix")
    return EntryQuery(limit=int(limit), **texts)


def _parse_key(http: HttpRequest) -> str:
    key = http.path.removeprefix(_ENTRIES)
    _check_key(key, "key")
    return key


def _check_key(key: str, param: str) -> None:
    if _size(key) > MAX_KEY_BYTES:
        raise AdminError(400, f"{param} should have at most {MAX_KEY_BYTES} bytes.", param=param)


def _size(text: str) -> int:
    """Return the bytes of a URL's part, in which bytes that aren't UTF-8 count as surrogates."""
    return len(text.encode(errors="replace"))


def _parse_purge(body: bytes) -> tuple[str, list[str]]:
    """Return the kind of label to purge, and the names.

    Raises:
        AdminError: the body is wrong.
    """
    should = f"The body should be an object with one of {', '.join((*KINDS, ALL))}."
    try:
        purge = orjson.loads(body)
    except ValueError as exc:
        raise AdminError(400, should) from exc
    if not isinstance(purge, dict) or len(purge) != 1:
        raise AdminError(400, should)
    ((kind, value),) = purge.items()
    if kind == ALL:
        if value is not True:
            raise AdminError(400, "all should be true.", param=ALL)
        return ALL, []
    if kind not in KINDS:
        raise AdminError(400, should, param=kind)
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise AdminError(400, f"{kind} should be a text or a list of texts.", param=kind)
    return kind, names
