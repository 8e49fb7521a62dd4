"""Two servers behind a TCP balancer are restarted in turn under load, and no request is lost.

Short by default; with TIERSERVE_LONG=1 it takes 20 rounds, of single processes too. Clients keep
their connections, and send nothing twice.
"""

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from tests.server.balancer import Balancer
from tests.server.conftest import CHAT, ROLE, WHOLE, Front, Upstream, alike, body, question, stream
from tests.server.raw_client import RawConnection, Reply
from tests.server.sides import LONG
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUNDS, WORKERS = (20, [1, 2]) if LONG else (1, [2])
PIECE_S, TOKENS = 0.02, 20
# Streams of the last two are longer than a server drains, and so don't say that they close.
MORE_TOKENS = [150] * 2 * LONG
UNTIL_TOLD = """
import asyncio, signal, sys
from server import process
handle = process.handle_signals
def handle_signals(stop, *options):
    handle(stop, *options)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stop.set)
process.handle_signals = handle_signals
from server.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Draining(Front):
    """A server that drains until it gets SIGUSR1: as long as it has to, however slow others are."""

    end_signal = signal.SIGINT

    @property
    def command(self) -> list[str]:
        python, _, _, *arguments = super().command
        return [python, "-c", UNTIL_TOLD, *arguments]


async def slowly(http: web.Request) -> web.StreamResponse:
    """What an engine does; a stream takes its time."""
    asked = orjson.loads(await http.read())
    await asyncio.sleep(PIECE_S)
    if not asked.get("stream"):
        return web.json_response(body())
    response = await stream(http, ROLE)
    for piece in [*asked["max_tokens"] * [WHOLE[1]], *WHOLE[2:]]:
        await asyncio.sleep(PIECE_S)
        await response.write(piece)
    return response


class Client:
    """One that keeps its connection until it is told that it closes."""

    def __init__(self, port: int, lost: list[str], tokens: int) -> None:
        self._port, self._connection, self._lost, self._tokens = port, None, lost, tokens
        self.outcomes: Counter[str] = Counter()
        self.reconnected = 0

    async def run(self, ended: asyncio.Event) -> None:
        """Ask what is new, known, streamed and passed through in turn, until the load ends."""
        known = question()
        kinds = itertools.cycle(
            [
                lambda: (CHAT, question()),
                lambda: (CHAT, known),
                lambda: (CHAT, question(stream=True, max_tokens=self._tokens)),
                lambda: (CHAT, known),
                lambda: ("/v1/others", {}),
            ]
        )
        while not ended.is_set():
            path, asked = next(kinds)()
            await self._ask(path, asked)
        self._close()

    async def _ask(self, path: str, asked: dict[str, Any]) -> None:
        if self._connection is None:
            self._connection = RawConnection(self._port)
            await self._connection.open()
            self.reconnected += 1
        data = orjson.dumps(asked)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        await self._connection.send(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        async with asyncio.timeout(HANGS_S):
            reply = await self._connection.reply_to("POST")
        self._note(asked, reply)
        if reply is None or reply.header("Connection") == "close":
            self._close()

    def _note(self, asked: dict[str, Any], reply: Reply | None) -> None:
        if reply is None or reply.status != 200:
            self._lost.append(f"{asked}: {reply}")
        elif asked.get("stream") and not reply.body.endswith(b"data: [DONE]\n\n"):
            self._lost.append(f"cut: {reply}")
        else:
            self.outcomes["hit" if "; hit" in str(reply.header("Cache-Status")) else "other"] += 1

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@asynccontextmanager
async def load(port: int, lost: list[str]) -> AsyncIterator[list[Client]]:
    """Clients that ask all the time."""
    tokens, ended = [TOKENS] * 6 + MORE_TOKENS, asyncio.Event()
    clients = [Client(port, lost, each) for each in tokens]
    runs = [asyncio.create_task(client.run(ended)) for client in clients]
    try:
        yield clients
    finally:
        ended.set()
        await asyncio.gather(*runs)


@pytest.mark.parametrize("workers", WORKERS)
async def test_no_request_is_lost(upstream: Upstream, tmp_path: Path, workers: int) -> None:
    upstream.handler = slowly
    lost: list[str] = []
    sections = {"server": {"drain_s": 3600, "workers": workers}}
    made = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        made.append(Draining(tmp_path / name, alike(upstream.url), sections=sections))
    one, other = made
    async with one, other, Balancer([one.port, other.port]) as balancer:
        await balancer.until_ready(one.port, other.port)
        async with load(balancer.port, lost) as clients:
            for _ in range(ROUNDS):
                for front, stays in ((one, other), (other, one)):
                    front.process.terminate()
                    await balancer.until_ready(stays.port)
                    # Each answer has closed its connection.
                    await balancer.until_left(front.port, but=len(MORE_TOKENS))
                    front.send(signal.SIGUSR1)
                    assert await asyncio.wait_for(front.process.wait(), HANGS_S) == 0
                    await front.session.close()
                    await front.start()
                    await balancer.until_ready(one.port, other.port)
        assert (lost[:3], balancer.lost) == ([], 0)
        outcomes = sum((client.outcomes for client in clients), Counter[str]())
        assert outcomes["hit"] > 0
        assert outcomes["other"] > 0
        # The load has met what it is to meet.
        assert sum(client.reconnected for client in clients) > len(clients)
