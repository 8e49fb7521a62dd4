"""Requests that are passed through: without buffering, without our addresses, WebSockets too."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from tests.server.conftest import (
    Front,
    Upstream,
    stream,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_other_routes_pass_without_buffering(front: Front, upstream: Upstream) -> None:
    go = asyncio.Event()

    async def two_pieces(http: web.Request) -> web.StreamResponse:
        assert http.raw_path == "/some/route?a=%20b"
        assert http.headers["X-Mine"] == "1"
        return await stream(http, b"one", go, b"two")

    upstream.handler = two_pieces
    async with front.session.put(
        aiohttp.client.URL("/some/route?a=%20b", encoded=True), data=b"x", headers={"X-Mine": "1"}
    ) as response:
        assert await response.content.readexactly(3) == b"one"
        go.set()
        assert await response.read() == b"two"


async def test_a_cut_pass_through_is_seen_as_cut(front: Front, upstream: Upstream) -> None:
    go = asyncio.Event()

    async def cut(http: web.Request) -> web.StreamResponse:
        response = await stream(http, b"some", go)
        assert http.transport is not None
        http.transport.close()
        return response

    upstream.handler = cut
    async with front.session.get("/elsewhere") as response:
        assert await response.content.readexactly(4) == b"some"
        go.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_a_redirect_does_not_lead_past_us(front: Front, upstream: Upstream) -> None:
    async def redirect(_: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"{upstream.url}/there?a=%20b"})

    upstream.handler = redirect
    async with front.session.get("/here", allow_redirects=False) as response:
        assert response.headers["Location"] == "/there?a=%20b"


async def test_absolute_targets_and_hop_by_hop_headers(front: Front, upstream: Upstream) -> None:
    async def fine(_: web.Request) -> web.StreamResponse:
        return web.Response()

    upstream.handler = fine
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(
        b"POST http://a.example/x//%7Ey?q HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n"
        b"Connection: X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n"
        b"Connection: X-Other, Anthropic-Beta\r\nX-Other: 3\r\nAnthropic-Beta: b\r\n\r\n1"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    (asked,) = upstream.asked
    assert asked.raw_path == "/x//%7Ey?q"
    assert not {"X-Hop", "X-Other"} & {*asked.headers}
    # The last is part of keys.
    assert (asked.headers["X-End"], asked.headers["Anthropic-Beta"]) == ("2", "b")
    # Nor do any come that the client has not sent.
    added = {"Accept", "Content-Type", "User-Agent"}
    assert added.isdisjoint(asked.headers)


async def test_websockets_pass_through(front: Front, upstream: Upstream) -> None:
    async def echo(http: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=["realtime"])
        await socket.prepare(http)
        async for message in socket:
            if message.data == "bye":
                await socket.close(code=4001)
            elif isinstance(message.data, bytes):
                await socket.send_bytes(message.data)
            else:
                await socket.send_str(message.data)
        return socket

    upstream.handler = echo
    session = front.session
    async with session.ws_connect("/v1/realtime?a=1", protocols=["x", "realtime"]) as socket:
        assert socket.protocol == "realtime"
        await socket.send_str("hi")
        assert await socket.receive_str() == "hi"
        await socket.send_bytes(b"\x00")
        assert await socket.receive_bytes() == b"\x00"
        await socket.send_str("bye")
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 4001
    assert upstream.asked[0].raw_path == "/v1/realtime?a=1"


async def test_a_websocket_that_is_refused_or_left(front: Front, upstream: Upstream) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=403)

    async def listen(http: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        async for _ in socket:
            pass
        upstream.aborted.set()
        return socket

    upstream.handler = refuse
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await front.session.ws_connect("/v1/realtime")
    assert caught.value.status == 403
    upstream.handler = listen
    async with front.session.ws_connect("/v1/realtime"):
        pass
    await asyncio.wait_for(upstream.aborted.wait(), HANGS_S)


@pytest.mark.parametrize("length", [True, False])
async def test_an_upload_goes_on_with_its_length(
    front: Front, upstream: Upstream, length: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"12"
        yield b"345"

    async def read(http: web.Request) -> web.StreamResponse:
        return web.Response(body=await http.read())

    upstream.handler = read
    headers = {"Content-Length": "5"} if length else {}
    async with front.session.post("/v1/files", data=pieces(), headers=headers) as response:
        assert await response.read() == b"12345"
    headers = upstream.asked[0].headers
    assert ("Content-Length" in headers, "Transfer-Encoding" in headers) == (length, not length)
