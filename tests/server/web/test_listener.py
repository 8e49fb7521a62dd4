"""Connections: kept, closed, half-closed, slow, and without valid HTTP on them."""

import asyncio
import re
from contextlib import suppress
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web

from tests.server.conftest import (
    CHAT,
    Front,
    Upstream,
    answer,
    body,
    chunk,
    question,
    running,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_connections_stay_or_close_as_asked(
    front: Front, upstream: Upstream, version: bytes
) -> None:
    raw = orjson.dumps(question())
    for wish in (b"keep-alive", b"close"):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        asked = (
            b"POST /v1/chat/completions HTTP/%s\r\nHost: a\r\nConnection: %s\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (version, wish, len(raw), raw)
        )
        for _ in range(2 if wish == b"keep-alive" else 1):
            writer.write(asked)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HANGS_S)
            assert (b"Connection: close" in head) is (wish == b"close")
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])
            await reader.readexactly(length)
        if wish == b"close":
            assert await asyncio.wait_for(reader.read(), HANGS_S) == b""
        writer.close()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"nonsense\r\n\r\n", ": its method is invalid, or it is TLS on a port without."),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
         ": its method is invalid, or it is TLS on a port without."),
        (b"GET / HTTP/9.9\r\n\r\n", ": its first line should end with HTTP/1.1 or HTTP/1.0."),
        (b"GET http://[s3cr3t/ HTTP/1.1\r\nHost: a\r\n\r\n", ": its target is no URL."),
        (b"GET / HTTP/1.1\r\nHost: a\r\ns3cr3t b: c\r\n\r\n", "."),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "."),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "."),
    ],
)  # fmt: skip
async def test_invalid_http_gets_a_reason(front: Front, sent: bytes, why: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(sent)
    reply = await asyncio.wait_for(reader.read(), HANGS_S)
    writer.close()
    error = orjson.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"] == f"The request is not valid HTTP{why}"


async def test_a_taken_port_is_logged(front: Front, upstream: Upstream) -> None:
    process = await asyncio.create_subprocess_exec(*front.command, stderr=asyncio.subprocess.PIPE)
    _, log = await asyncio.wait_for(process.communicate(), HANGS_S)
    assert process.returncode == 1
    assert f"can't listen at 127.0.0.1 port {front.port}: Address already in use" in log.decode()


async def test_slow_clients_get_408(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__CLIENT_TIMEOUT_S", "0.3")
    half = b"Host: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"

    async def send_half(front: Front, path: str) -> None:
        reply = b""
        async with asyncio.timeout(HANGS_S):
            # Who is too slow for half of it is told nothing.
            while not reply:
                reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
                writer.write(b"POST " + path.encode() + b" HTTP/1.1\r\n" + half)
                with suppress(ConnectionError):
                    reply = await reader.read()
                writer.close()
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"type":"RequestTimeoutError"' in reply

    async with running(tmp_path, upstream) as front:
        # At once, since each connection is open for ten seconds more.
        await asyncio.gather(send_half(front, CHAT), send_half(front, "/v1/others"))
        for beginning in (b"", b"POST " + CHAT.encode() + b" HT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(beginning)
            # By a reset, if it was too slow for that as well.
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), HANGS_S) == b""
            writer.close()
        async with asyncio.timeout(HANGS_S):
            assert await status_of(front) == 200


async def status_of(front: Front) -> int:
    """Return the status of a new question to a server that waits for no slow client."""
    while True:
        # A new connection may have been too slow for its first request.
        with suppress(aiohttp.ClientConnectionError):
            return (await front.ask(question()))[0]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_stops_reading_gives_its_place_up(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__CLIENT_TIMEOUT_S", "0.3")
    monkeypatch.setenv("TIERSERVE__MODELS__M__MAX_REQUESTS", "1")
    path = CHAT if is_stream else "/endless"
    more = chunk({"content": "x" * 64 * 1024}) if is_stream else bytes(64 * 1024)

    async def endless(http: web.Request) -> web.StreamResponse:
        if not orjson.loads(await http.read()).get("stream"):
            return await answer(http)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        while True:
            await response.write(more)

    upstream.handler = endless
    async with running(tmp_path, upstream) as front:
        asked = sent(path, question(stream=True))
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1024)
        writer.write(asked)
        async with asyncio.timeout(HANGS_S):
            while not any(each.path == path for each in upstream.asked):
                await front.ready()
                if reader.at_eof() or reader.exception():
                    # It was too slow for its first request.
                    writer.close()
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", front.port, limit=1024
                    )
                    writer.write(asked)
            refused = 0
            while await status_of(front) != 200:
                refused += 1
        # It was no fault of the engine.
        await front.until_metric('tierserve_requests_total{model="m",outcome="aborted"', 1)
        assert await front.metric('tierserve_requests_total{model="m",outcome="error"') == refused
        writer.close()
    upstream.handler = answer


def sent(path: str, asked: dict | None = None, version: str = "1.1") -> bytes:
    """A request as it is sent: a POST if there is something to ask."""
    raw = b"" if asked is None else orjson.dumps(asked)
    head = f"{'GET' if asked is None else 'POST'} {path} HTTP/{version}\r\nHost: a\r\n"
    more = f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return (head + more).encode() + raw


async def half_closed(
    front: Front, data: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(data)
    writer.write_eof()
    return reader, writer


async def test_a_half_closed_client_is_answered(front: Front, upstream: Upstream) -> None:
    asked, streamed, chance = question(), question(stream=True), question(temperature=1)
    for data in (
        sent("/health"),
        sent("/health", version="1.0"),
        sent("/health") + sent("/ready") + sent(CHAT, asked),
        sent(CHAT, asked),
        sent(CHAT, streamed),
        sent(CHAT, chance),
        sent("/v1/others", {"a": 1}),
    ):
        reader, writer = await half_closed(front, data)
        reply = await asyncio.wait_for(reader.read(), HANGS_S)
        # Where its answer takes long, it is asked whether it is still there.
        heads = re.findall(rb"HTTP/1.[01] ((?!100)\d+) ", reply)
        assert heads == [b"200"] * data.count(b" HTTP/1."), data
        writer.close()
    for data in (b"", b"GET", sent(CHAT, asked)[:-1]):
        reader, writer = await half_closed(front, data)
        assert await asyncio.wait_for(reader.read(), HANGS_S) == b""
        writer.close()


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
@pytest.mark.parametrize("gone", [False, True])
async def test_a_half_closed_client_that_has_gone_is_noticed(
    front: Front, upstream: Upstream, path: str, gone: bool
) -> None:
    go = asyncio.Event()

    async def slow(http: web.Request) -> web.StreamResponse:
        await go.wait()
        return web.json_response(body())

    upstream.handler = slow
    reader, writer = await half_closed(front, sent(path, question()))
    if gone:
        writer.close()
        await asyncio.wait_for(upstream.aborted.wait(), HANGS_S)
        return
    # Two of them, so that the first has been answered by no reset.
    for _ in range(2):
        reply = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HANGS_S)
        assert reply == b"HTTP/1.1 100 Continue\r\n\r\n"
    go.set()
    reply = await asyncio.wait_for(reader.read(), HANGS_S)
    assert b"HTTP/1.1 200 OK\r\n" in reply
    assert b'"content":"yes"' in reply.replace(b'": "', b'":"')
    assert not upstream.aborted.is_set()
    writer.close()
