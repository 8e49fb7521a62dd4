"""A tierserve with several workers, and clients of each of them."""

import asyncio
from contextlib import suppress

import aiohttp
import psutil

from tests.server.conftest import CHAT, Front
from tests.waiting import HANGS_S

# What the ids of a process's requests have in common.
ID_CHARACTERS = 24


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


async def until_gone(pids: set[int]) -> None:
    async with asyncio.timeout(HANGS_S):
        while any(map(alive, pids)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class Client:
    """One connection, and so a client of one worker."""

    def __init__(self, front: Front) -> None:
        # Another connection could be one of another worker's.
        connector = aiohttp.TCPConnector(limit=1, ssl=False, keepalive_timeout=3600)
        self.session = aiohttp.ClientSession(front.url, connector=connector, headers=front.headers)
        self.worker = ""

    async def begin(self) -> None:
        async with self.session.get("/health") as reply:
            self.worker = reply.headers["X-Request-Id"][:ID_CHARACTERS]

    async def ask(self, asked: dict, **options) -> tuple[int, str, bytes]:
        async with self.session.post(CHAT, json=asked, **options) as reply:
            status = reply.headers.get("Cache-Status", "")
            assert reply.headers["X-Request-Id"][:ID_CHARACTERS] == self.worker
            return reply.status, status, await reply.read()

    async def ask_alone(self, asked: dict, **options) -> tuple[int, str, bytes]:
        """Ask until the answer isn't another request's, which may not be stored yet."""
        async with asyncio.timeout(HANGS_S):
            while "collapsed" in (reply := await self.ask(asked, **options))[1]:
                pass
        return reply


class Fleet(Front):
    """The server, and one client of each worker."""

    def __init__(self, folder, models, *, workers=2, sections=None, **options) -> None:
        self.workers = workers
        own = {"workers": workers} | (sections or {}).get("server", {})
        super().__init__(folder, models, sections={**(sections or {}), "server": own}, **options)
        self.clients: dict[str, Client] = {}

    async def start(self) -> None:
        await super().start()
        await self.until_logged(f"with {self.workers} workers")
        await self.until_clients()

    async def stop(self) -> None:
        await self.disconnect()
        await super().stop()

    async def disconnect(self) -> None:
        while self.clients:
            await self.clients.popitem()[1].session.close()

    async def until_clients(self, *, but: frozenset[str] = frozenset()) -> list[Client]:
        """Connect until each worker has a client; returns all clients.

        `but` are processes that have died.
        """
        for worker in but:
            await self.clients.pop(worker).session.close()
        async with asyncio.timeout(HANGS_S):
            while len(self.clients) < self.workers:
                made = Client(self)
                await made.begin()
                if made.worker in self.clients:
                    await made.session.close()
                else:
                    self.clients[made.worker] = made
        return [*self.clients.values()]

    def pids(self) -> set[int]:
        return {each.pid for each in psutil.Process(self.process.pid).children()}

    def pid_of(self, worker: str) -> int:
        """Return the process at the other end of the worker's client's connection."""
        transport = next(iter(self.clients[worker].session.connector._conns.values()))
        port = transport[0][0].transport.get_extra_info("sockname")[1]
        return next(
            pid
            for pid in self.pids()
            for each in psutil.Process(pid).net_connections("tcp")
            if each.raddr and each.raddr.port == port
        )

    async def purge(self, **what) -> int:
        """Purge until the disk is quick enough for it; returns how many times that took."""
        times, status = 0, 503
        async with asyncio.timeout(HANGS_S):
            while status == 503:
                times, (status, _) = times + 1, await self.admin("POST", "/purge", json=what)
        assert status == 200
        return times

    async def admin(self, method: str, path: str, **options) -> tuple[int, dict]:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with (
            aiohttp.ClientSession("http://admin", connector=connector) as session,
            session.request(method, path, **options) as reply,
        ):
            return reply.status, await reply.json()
