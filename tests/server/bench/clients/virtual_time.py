"""An event loop whose time passes only when all wait, and servers that live in it."""

import asyncio
import selectors
from collections.abc import Callable
from math import inf

from server.bench.clients.client import Client, Part
from server.bench.clients.http_connection import KeptConnection
from server.bench.clients.schedule import due_times
from server.bench.load import Load, Target
from server.bench.records import ClientLoad, Records

ANSWER = b'{"choices":[{"index":0}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'


def reply(body: bytes = ANSWER, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Selector(selectors.SelectSelector):
    loop: "VirtualLoop"

    def select(self, timeout=None):
        if timeout is None:
            raise AssertionError("nothing will ever happen")
        self.loop.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


class LoopTimer:
    def __init__(self, ring: Callable[[], None]) -> None:
        self.ring, self.handle = ring, None

    def set(self, at: float) -> None:
        self.close()
        if at < inf:
            self.handle = asyncio.get_running_loop().call_at(at, self.ring)

    def close(self) -> None:
        if self.handle is not None:
            self.handle.cancel()


class Wire:
    """The server's side of a connection: asks `answer` for each request when what is to come."""

    def __init__(self, connection: KeptConnection, answer: Callable[[float], float]) -> None:
        self.connection, self.answer = connection, answer

    def write(self, _: bytes) -> None:
        loop = asyncio.get_running_loop()
        loop.call_at(self.answer(loop.time()), self.deliver)

    def deliver(self) -> None:
        if self.connection.exchange is not None:
            self.connection.data_received(reply())

    def abort(self) -> None:
        asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)


def measure(
    workload,
    load: Load,
    answer: Callable[[float], float],
    *,
    process: int = 0,
    probe=None,
    connect_s: float = 0.0,
) -> tuple[Records, ClientLoad]:
    """Return what a client measures of a server that answers a request of time t at `answer(t)`."""

    async def connect(make: Callable[[], KeptConnection]) -> KeptConnection:
        await asyncio.sleep(connect_s)
        connection = make()
        connection.connection_made(Wire(connection, answer))
        return connection

    async def run() -> tuple[Records, ClientLoad]:
        times = None if load.users is not None else due_times(load, workload)
        mine = None if times is None else times[process :: load.processes]
        part = Part(process, Target("http://server"), load, workload, mine, probe)
        clock = asyncio.get_running_loop().time
        return await Client(part, clock, LoopTimer, connect).run(clock())

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(run())
