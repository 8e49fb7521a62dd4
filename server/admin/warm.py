"""Warming: requests from a file, sent to a running server so that it keeps their answers."""

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
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - as clients reach it.
_CONNECT_S = 10
_NAMED = 20


class Warmed(NamedTuple):
    """How many requests met what."""

    hits: int
    misses: int
    not_kept: int
    """Answered, but by what is never cached."""
    errors: int
    malformed: int
    """Lines that are no request, and weren't sent."""


class Asked(NamedTuple):
    """A request of the file."""

    line: int
    route: str
    body: bytes


async def warm(config: Config, file: Path, concurrency: int, say: Callable[[str], None]) -> Warmed:
    """Send the requests in `file`, and count what became of them.

    Each line is the body of a chat completion or, with a `prompt`, of a completion; or an object
    of such a `body` and its `route`. `OPENAI_API_KEY` is sent as OpenAI's client does, since
    answers are kept for each key apart.

    Args:
        config: tells where the server listens.
        file: JSONL.
        concurrency: how many requests are under way at once.
        say: told of each line that is no request, and of the first errors.

    Raises:
        AdminError: no server answers.
        OSError: the file can't be read.
    """
    counts = dict.fromkeys(Warmed._fields, 0)
    total = 0
    for number, line in _lines(file):
        try:
            _request(number, line)
        except ValueError as exc:
            counts["malformed"] += 1
            say(f"{file}:{number}: {exc}")
        else:
            total += 1
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    longest_s = max(model.timeout_s for model in config.models.values())
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=longest_s)
    # Its own certificate, whatever names that is for: the address is this machine's.
    known = True if (tls := config.server.tls) is None else aiohttp.Fingerprint(fingerprint(tls))
    connector = aiohttp.TCPConnector(ssl=known)
    async with aiohttp.ClientSession(
        _url(config), headers=headers, timeout=timeout, connector=connector
    ) as session:
        await _check(session, _url(config))
        free = asyncio.Semaphore(concurrency)

        async def send(asked: Asked) -> None:
            try:
                met, problem = await _send(session, asked)
            finally:
                free.release()
            counts[met] += 1
            if problem and counts["errors"] <= _NAMED:
                say(f"{file}:{asked.line}: {problem}")

        async with asyncio.TaskGroup() as group:
            for asked in progress(_requests(file), "warm", total=total):
                await free.acquire()
                group.create_task(send(asked))
    return Warmed(**counts)


async def _check(session: aiohttp.ClientSession, url: str) -> None:
    try:
        async with session.get("/health"):
            pass
    except (aiohttp.ClientError, OSError) as exc:
        # The address is the user's own.
        should = "server.host and server.port should be those of a running server"
        raise AdminError(502, f"no server answers at {url}; {should}") from exc


async def _send(session: aiohttp.ClientSession, asked: Asked) -> tuple[str, str]:
    """Return what a request met, and what went wrong."""
    try:
        async with session.post(asked.route, data=asked.body) as response:
            async for _ in response.content.iter_any():
                pass
            status = response.headers.get("Cache-Status", "")
            if response.status >= 400:
                return "errors", f"answered with status {response.status}"
    except (aiohttp.ClientError, OSError) as exc:
        return "errors", f"was not answered: {exc or type(exc).__name__}"
    if "tierserve; hit" in status:
        return "hits", ""
    return ("not_kept" if "fwd=bypass" in status or not status else "misses"), ""


def _requests(file: Path) -> Iterator[Asked]:
    for number, line in _lines(file):
        try:
            yield _request(number, line)
        except ValueError:
            # It has been named.
            continue


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _request(number: int, line: bytes) -> Asked:
    """Return the request of a line.

    Raises:
        ValueError: it is none.
    """
    try:
        told: Any = orjson.loads(line)
    except ValueError as exc:
        raise ValueError(f"isn't JSON: {exc}") from exc
    if not isinstance(told, dict):
        raise ValueError("should be an object, the body of a request")
    if "body" not in told and "route" not in told:
        return Asked(number, _COMPLETIONS if "prompt" in told else _CHAT, line.strip())
    if unknown := sorted(told.keys() - {"route", "body"}):
        raise ValueError(f"should have only route and body, not {unknown[0]!r}")
    route, body = told.get("route", _CHAT), told.get("body")
    if route not in CACHED_ROUTES:
        raise ValueError(f"route should be one of {', '.join(CACHED_ROUTES)}, not {route!r}")
    if not isinstance(body, dict):
        raise ValueError("body should be an object")
    return Asked(number, route, orjson.dumps(body))


def _url(config: Config) -> str:
    if not config.server.port:
        raise AdminError(400, "server.port should be that of the running server, not 0")
    host = _ANY.get(config.server.host, config.server.host)
    scheme = "http" if config.server.tls is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.server.port}"
