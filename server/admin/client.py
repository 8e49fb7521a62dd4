"""A client of a server's admin API, which offers the same operations as in this process."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
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

_CONNECT_S = 10
_READ_TIMEOUT_S = 60.0
# To verify or import a large file takes minutes, through which its server is looked at.
_CHECK_EVERY_S = 5.0
_ENDED = AdminError(502, "The server ended before it had answered.")


def is_answering(path: Path) -> bool:
    """Return whether a server answers at the socket `path`.

    Raises:
        OSError: there is one, but it isn't for this user.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
    return True


class AdminClient(AdminOperations):
    """The operations through a server.

    Args:
        session: connects to it.
        max_line_bytes: of an export.
    """

    def __init__(self, session: aiohttp.ClientSession, max_line_bytes: int) -> None:
        self._session, self._max_line_bytes = session, max_line_bytes

    async def stats(self) -> dict[str, Any]:
        return await self._ask("GET", "/stats")

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        given = {name: str(value) for name, value in query._asdict().items() if value}
        return await self._ask("GET", "/entries", params=given)

    async def entry(self, key: str) -> dict[str, Any]:
        return await self._ask("GET", URL(f"/entries/{quote(key, safe='')}", encoded=True))

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        told = await self._ask("POST", "/purge", json={kind: True if kind == ALL else [*names]})
        labels: list[str] = told["purged"]
        return labels

    async def export(self) -> AsyncIterator[bytes]:
        try:
            async with self._session.get("/export") as response:
                await _check(response)
                async for line in split_lines(response.content.iter_any(), self._max_line_bytes):
                    yield line + b"\n"
        except TimeoutError as exc:
            raise _silent() from exc
        except aiohttp.ClientError as exc:
            raise _ENDED from exc

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        ended = (line + b"\n" async for line in lines)
        return await self._ask_patiently("/import", data=ended)

    async def compact(self) -> dict[str, Any]:
        return await self._ask("POST", "/compact")

    async def verify(self) -> dict[str, Any]:
        return await self._ask_patiently("/verify")

    async def _ask_patiently(self, path: str, **options: Any) -> dict[str, Any]:
        """Ask for what may take minutes, for as long as the server answers others."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        asked = asyncio.create_task(self._ask("POST", path, timeout=timeout, **options))
        others = asyncio.create_task(self._look())
        try:
            await asyncio.wait([asked, others], return_when=asyncio.FIRST_COMPLETED)
            return (asked if asked.done() else others).result()
        finally:
            asked.cancel()
            others.cancel()
            await asyncio.gather(asked, others, return_exceptions=True)

    async def _look(self) -> NoReturn:
        """Fail once the server answers no more."""
        while True:
            await self.stats()
            await asyncio.sleep(_CHECK_EVERY_S)

    async def _ask(self, method: str, path: str | URL, **options: Any) -> dict[str, Any]:
        try:
            async with self._session.request(method, path, **options) as response:
                await _check(response)
                told: dict[str, Any] = orjson.loads(await response.read())
                return told
        except aiohttp.ServerTimeoutError as exc:
            raise _silent() from exc
        except (aiohttp.ClientError, ValueError) as exc:
            raise _ENDED from exc


@asynccontextmanager
async def connect(path: Path, max_line_bytes: int) -> AsyncIterator[AdminClient]:
    """Yield a client of the server at the socket `path`."""
    connector = aiohttp.UnixConnector(str(path))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_TIMEOUT_S)
    async with aiohttp.ClientSession("http://admin", connector=connector, timeout=timeout) as made:
        yield AdminClient(made, max_line_bytes)


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    try:
        error = orjson.loads(await response.read())["error"]
        message, param = error["message"], error["param"]
    except (ValueError, LookupError, TypeError) as exc:
        raise _ENDED from exc
    raise AdminError(response.status, message, param=param)


def _silent() -> AdminError:
    said = f"What listens at admin.socket has said nothing for {_READ_TIMEOUT_S:g} seconds; it should be "
    return AdminError(504, said + "a tierserve that works. Stop it, and the file can be used.")
