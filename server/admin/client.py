"""A client of a server's admin API, with the same operations as `local`."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from server.admin.export_format import split_lines
from server.admin.operations import AdminError, AdminOperations, EntryQuery
from tiers.purges.table import ALL

_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60.0
# Verifying or importing a large file takes minutes; we check meanwhile that the server answers.
_CHECK_EVERY_S = 5.0
_ENDED = AdminError(502, "The connection ended before the server's answer was complete.")


def is_answering(path: Path) -> bool:
    """Return whether a server listens at the socket `path`.

    Raises:
        OSError: the socket exists, but this user may not connect to it.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
    return True


class AdminClient(AdminOperations):
    """The operations of a server.

    Args:
        session: its connections lead to the server.
        max_line_bytes: the longest line of an export; longer lines are cut.
    """

    def __init__(self, session: aiohttp.ClientSession, max_line_bytes: int) -> None:
        self._session, self._max_line_bytes = session, max_line_bytes

    async def stats(self) -> dict[str, Any]:
        return await self._request("GET", "/stats")

    async def chains(self, limit: int, label: str = "") -> dict[str, Any]:
        params = {"limit": str(limit)} | ({"label": label} if label else {})
        return await self._request("GET", "/chains", params=params)

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        params = {name: str(value) for name, value in query._asdict().items() if value}
        return await self._request("GET", "/entries", params=params)

    async def entry(self, key: str) -> dict[str, Any]:
        return await self._request("GET", URL(f"/entries/{quote(key, safe='')}", encoded=True))

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        body = {kind: True if kind == ALL else [*names]}
        labels: list[str] = (await self._request("POST", "/purge", json=body))["purged"]
        return labels

    async def export(self) -> AsyncGenerator[bytes, None]:
        try:
            async with self._session.get("/export") as response:
                await _raise_for_status(response)
                async for line in split_lines(response.content.iter_any(), self._max_line_bytes):
                    yield line + b"\n"
        except TimeoutError as exc:
            raise _timed_out() from exc
        except aiohttp.ClientError as exc:
            raise _ENDED from exc

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        ended = (line + b"\n" async for line in lines)
        return await self._request_slow("/import", data=ended)

    async def compact(self) -> dict[str, Any]:
        return await self._request("POST", "/compact")

    async def verify(self) -> dict[str, Any]:
        return await self._request_slow("/verify")

    async def _request_slow(self, path: str, **options: Any) -> dict[str, Any]:
        """Send a POST whose answer may take minutes, and wait while the server answers others."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        request = asyncio.create_task(self._request("POST", path, timeout=timeout, **options))
        checks = asyncio.create_task(self._check())
        try:
            await asyncio.wait([request, checks], return_when=asyncio.FIRST_COMPLETED)
            return (request if request.done() else checks).result()
        finally:
            request.cancel()
            checks.cancel()
            await asyncio.gather(request, checks, return_exceptions=True)

    async def _check(self) -> NoReturn:
        """Raise `AdminError` once the server does not answer."""
        while True:
            await self.stats()
            await asyncio.sleep(_CHECK_EVERY_S)

    async def _request(self, method: str, path: str | URL, **options: Any) -> dict[str, Any]:
        try:
            async with self._session.request(method, path, **options) as response:
                await _raise_for_status(response)
                answer: dict[str, Any] = orjson.loads(await response.read())
                return answer
        except aiohttp.ServerTimeoutError as exc:
            raise _timed_out() from exc
        except (aiohttp.ClientError, ValueError) as exc:
            raise _ENDED from exc


@asynccontextmanager
async def connect(path: Path, max_line_bytes: int) -> AsyncIterator[AdminClient]:
    """Yield a client of the server at the socket `path`."""
    connector = aiohttp.UnixConnector(str(path))
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S
    )
    async with aiohttp.ClientSession(
        "http://admin", connector=connector, timeout=timeout
    ) as session:
        yield AdminClient(session, max_line_bytes)


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    try:
        error = orjson.loads(await response.read())["error"]
        message, param = error["message"], error["param"]
    except (ValueError, LookupError, TypeError) as exc:
        raise _ENDED from exc
    raise AdminError(response.status, message, param=param)


def _timed_out() -> AdminError:
    problem = f"The process at admin.socket did not answer within {_READ_TIMEOUT_S:g} seconds"
    return AdminError(504, f"{problem}. Stop it; then this command uses the disk tier's file.")
