"""Warming: sends the requests of a file to a running server, so that it stores their answers."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson

from server.admin.operations import AdminError
from server.config.schema import Config
from server.protocol.routes import CACHED_ROUTES
from server.terminal import progress
from server.web.tls import fingerprint

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Where clients of this machine reach a server that listens on all addresses.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104
_CONNECT_TIMEOUT_S = 10
_MAX_ERRORS_REPORTED = 20


class WarmResult(NamedTuple):
    """How many requests had which outcome."""

    hits: int
    misses: int
    not_kept: int
    """Answered, but not stored, since the request or its answer may not be."""
    errors: int
    malformed: int
    """Lines that are no request, and weren't sent."""


class WarmRequest(NamedTuple):
    """A request of the file."""

    line: int
    route: str
    body: bytes


async def warm(
    config: Config, file: Path, concurrency: int, report: Callable[[str], None]
) -> WarmResult:
    """Send the requests in `file`, and count their outcomes.

    Each line is the body of a chat completion or, with a `prompt`, of a completion; or an object
    with such a `body` and its `route`. `OPENAI_API_KEY` is sent as OpenAI's client does, since
    each key has answers of its own.

    Args:
        config: has the server's address.
        file: JSONL.
        concurrency: how many requests are sent at once.
        report: gets a line for each malformed request and for the first errors.

    Raises:
        AdminError: no server answers.
        OSError: the file can't be read.
    """
    counts = dict.fromkeys(WarmResult._fields, 0)
    total, counts["malformed"] = _count_lines(file, report)
    async with _session(config) as session:
        await _check_server(session, _url(config))
        free = asyncio.Semaphore(concurrency)

        async def send(request: WarmRequest) -> None:
            try:
                outcome, problem = await _send(session, request)
            finally:
                free.release()
            counts[outcome] += 1
            if problem and counts["errors"] <= _MAX_ERRORS_REPORTED:
                report(f"{file}:{request.line}: {problem}")

        # The file is read a second time, so that it need not fit into memory.
        requests = (each for each in _parse(file) if isinstance(each, WarmRequest))
        async with asyncio.TaskGroup() as group:
            for request in progress(requests, "warm", total=total):
                await free.acquire()
                group.create_task(send(request))
    return WarmResult(**counts)


def _session(config: Config) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    longest_s = max(model.timeout_s for model in config.models.values())
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=longest_s
    )
    # The server is known by its certificate, since that names hosts other than this address.
    tls = config.server.tls
    ssl = True if tls is None else aiohttp.Fingerprint(fingerprint(tls))
    connector = aiohttp.TCPConnector(ssl=ssl)
    return aiohttp.ClientSession(
        _url(config), headers=headers, timeout=timeout, connector=connector
    )


async def _check_server(session: aiohttp.ClientSession, url: str) -> None:
    try:
        async with session.get("/health"):
            pass
    except (aiohttp.ClientError, OSError) as exc:
        should = "server.host and server.port should be those of a running server"
        raise AdminError(502, f"no server answers at {url}; {should}") from exc


async def _send(session: aiohttp.ClientSession, request: WarmRequest) -> tuple[str, str]:
    """Return a request's outcome (a field of `WarmResult`), and the problem if it failed."""
    try:
        async with session.post(request.route, data=request.body) as response:
            async for _ in response.content.iter_any():
                pass
            status = response.headers.get("Cache-Status", "")
            if response.status >= 400:
                return "errors", f"answered with status {response.status}"
            if model := response.headers.get("X-Tierserve-Fallback"):
                return "errors", f"answered by {model}, its model's fallback"
    except (aiohttp.ClientError, OSError) as exc:
        return "errors", f"was not answered: {exc or type(exc).__name__}"
    if "tierserve; hit" in status:
        return "hits", ""
    return ("not_kept" if "fwd=bypass" in status or not status else "misses"), ""


def _count_lines(file: Path, report: Callable[[str], None]) -> tuple[int, int]:
    """Return how many lines are requests and how many are not, and report the latter."""
    good = malformed = 0
    for request in _parse(file):
        if isinstance(request, WarmRequest):
            good += 1
        else:
            malformed += 1
            report(f"{file}:{request}")
    return good, malformed


def _parse(file: Path) -> Iterator[WarmRequest | str]:
    """Yield the request of each line, or its number and what is wrong with it."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _parse_line(number, line)
                except ValueError as exc:
                    yield f"{number}: {exc}"


def _parse_line(number: int, line: bytes) -> WarmRequest:
    """Return the request of a line.

    Raises:
        ValueError: the line is no request.
    """
    try:
        fields: Any = orjson.loads(line)
    except ValueError as exc:
        raise ValueError(f"isn't JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise ValueError("should be an object, the body of a request")
    if "body" not in fields and "route" not in fields:
        return WarmRequest(number, _COMPLETIONS if "prompt" in fields else _CHAT, line.strip())
    if unknown := sorted(fields.keys() - {"route", "body"}):
        raise ValueError(f"should have only route and body, not {unknown[0]!r}")
    route, body = fields.get("route", _CHAT), fields.get("body")
    if route not in CACHED_ROUTES:
        raise ValueError(f"route should be one of {', '.join(CACHED_ROUTES)}, not {route!r}")
    if not isinstance(body, dict):
        raise ValueError("body should be an object")
    return WarmRequest(number, route, orjson.dumps(body))


def _url(config: Config) -> str:
    if not config.server.port:
        raise AdminError(400, "server.port should be that of the running server, not 0")
    host = _LOOPBACK.get(config.server.host, config.server.host)
    scheme = "http" if config.server.tls is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.server.port}"
