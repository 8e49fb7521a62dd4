"""What the short way in takes for granted of aiohttp's protocol, seen through a real connection."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from server.config.schema import ServerConfig
from server.web import listener
from server.web.connection import RELIED_ON, Connection
from server.web.known_requests import KnownRequests
from server.web.listener import listen, make_server
from server.web.request import HttpRequest
from tests.server.raw_client import RawConnection
from tests.servers import free_port
from tests.waiting import HANGS_S

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"


class Seen(NamedTuple):
    """Both ends of a connection, and the handler's."""

    client: RawConnection
    protocol: Any
    begun: asyncio.Queue[HttpRequest]
    """Requests that have begun."""
    go: asyncio.Semaphore
    """Lets one of them end."""

    async def until(self, name: str, *, is_set: bool) -> None:
        """Wait until an attribute of the protocol is set, or isn't any more."""
        async with asyncio.timeout(HANGS_S):
            while bool(getattr(self.protocol, name)) is not is_set:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def connected() -> AsyncIterator[Seen]:
    begun: asyncio.Queue[HttpRequest] = asyncio.Queue()
    go = asyncio.Semaphore(0)

    async def endpoint(http: HttpRequest) -> web.StreamResponse:
        if http.method == "PUT":
            return web.Response(status=405)
        begun.put_nowait(http)
        await go.acquire()
        return web.Response(body=await http.read())

    options, port = ServerConfig(), free_port()
    server = make_server(endpoint, options)
    listening = await listen(server, "127.0.0.1", port, options, None, KnownRequests())
    client = RawConnection(port)
    try:
        await client.open()
        async with asyncio.timeout(HANGS_S):
            while not server.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        yield Seen(client, server.connections[0], begun, go)
    finally:
        client.close()
        listening.close()
        await server.shutdown(0)


def is_idle(protocol: Any) -> bool:
    names = ("_messages", "_upgraded", "_paused", "_close", "_force_close", "_current_request")
    return protocol._waiter is not None and not any(getattr(protocol, name) for name in names)


async def test_aiohttp_is_idle_between_requests() -> None:
    async with asyncio.timeout(HANGS_S), connected() as seen:
        protocol, client = seen.protocol, seen.client
        await seen.until("_waiter", is_set=True)
        assert is_idle(protocol)
        assert protocol._request_count == 0
        for number in (1, 2):
            await client.send(HEAD + b"bo")
            http = await seen.begun.get()
            assert protocol._waiter is None
            assert protocol._current_request is http
            assert protocol._request_count == number
            assert not protocol._messages
            # What was sent of its body, and whether that is all.
            assert (http.content.total_bytes, http.content.is_eof()) == (2, False)
            await client.send(b"dy" + HEAD + b"next")
            await seen.until("_messages", is_set=True)
            ((_, payload),) = protocol._messages
            assert (payload.total_bytes, payload.is_eof()) == (4, True)
            assert (http.content.total_bytes, http.content.is_eof()) == (4, True)
            before, protocol._next_keepalive_close_time = protocol._next_keepalive_close_time, 0
            for body in (b"body", b"next"):
                seen.go.release()
                reply = await client.reply_to("POST")
                assert reply is not None
                assert reply.body == body
            protocol._request_count -= 1
            await seen.begun.get()
            await seen.until("_waiter", is_set=True)
            assert is_idle(protocol)
            # Every response moves the end of the connection.
            assert protocol._next_keepalive_close_time >= before > protocol._loop.time()


async def test_a_connection_is_closed_once_it_has_idled() -> None:
    async with asyncio.timeout(HANGS_S), connected() as seen:
        protocol, client = seen.protocol, seen.client
        await seen.until("_waiter", is_set=True)
        for part in (b"bo", b"dy"):
            await client.send((HEAD if part == b"bo" else b"") + part)
            # Its first request may come, and then is under way.
            protocol.close_if_idle(for_s=HANGS_S)
            await seen.until("_current_request", is_set=True)
            protocol.close_if_idle(for_s=0)
        seen.go.release()
        reply = await client.reply_to("POST")
        assert reply is not None
        assert reply.body == b"body"
        await seen.until("_waiter", is_set=True)
        protocol.close_if_idle(for_s=HANGS_S)
        assert protocol.transport is not None
        protocol.close_if_idle(for_s=0)
        assert await client.rest() == b""


async def test_aiohttp_is_busy_until_an_unread_body_has_come() -> None:
    async with asyncio.timeout(HANGS_S), connected() as seen:
        await seen.client.send(HEAD.replace(b"POST", b"PUT"))
        reply = await seen.client.reply_to("PUT")
        assert reply is not None
        assert reply.status == 405
        await seen.until("_current_request", is_set=False)
        # Nothing else tells that the next bytes are no request.
        assert seen.protocol._waiter is None
        assert not seen.protocol._messages
        await seen.client.send(b"body")
        await seen.until("_waiter", is_set=True)
        assert is_idle(seen.protocol)


async def test_aiohttp_says_when_it_is_not_to_be_written_to() -> None:
    async with connected() as seen:
        protocol = seen.protocol
        await seen.until("_waiter", is_set=True)
        protocol.pause_writing()
        assert protocol._paused
        protocol.resume_writing()
        assert is_idle(protocol)
        upgrade = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        await seen.client.send(upgrade)
        await seen.until("_upgraded", is_set=True)
    for end, name in ((Connection.close, "_close"), (Connection.force_close, "_force_close")):
        async with connected() as seen:
            end(seen.protocol)
            assert getattr(seen.protocol, name)
            assert not is_idle(seen.protocol)


@pytest.mark.parametrize("is_read", [True, False])
async def test_a_client_is_ahead_of_the_news_that_it_has_read_all(is_read: bool) -> None:
    """It gets its answer without parsing a turn later if that is so, and by the long way if not."""
    async with asyncio.timeout(HANGS_S), connected() as seen:
        protocol, client = seen.protocol, seen.client
        await seen.until("_waiter", is_set=True)
        known, answer = protocol._known, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nknow"
        for _ in range(2):
            known.offer(HEAD, b"body", lambda: answer)
        protocol.pause_writing()
        protocol.data_received(HEAD + b"body")
        assert known.answered == protocol._request_count == 0
        if is_read:
            protocol.resume_writing()
        else:
            http = await seen.begun.get()
            assert await http.read() == b"body"
            protocol.resume_writing()
            seen.go.release()
        reply = await client.reply_to("POST")
        assert reply is not None
        assert reply.body == (b"know" if is_read else b"body")
        assert known.answered == is_read


@pytest.mark.parametrize("name", RELIED_ON)
async def test_without_an_attribute_all_requests_are_parsed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hidden: dict[int, Any] = {}

    class Lacking(Connection):
        def __init__(self, *args: Any) -> None:
            self.hides = True
            super().__init__(*args)
            self.hides = False

    def get(self: Lacking) -> Any:
        if self.hides:
            raise AttributeError(name)
        return hidden[id(self)]

    monkeypatch.setattr(listener, "Connection", Lacking)
    setattr(Lacking, name, property(get, lambda self, value: hidden.__setitem__(id(self), value)))
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(HANGS_S), connected() as seen:
            assert seen.protocol._known is None
            seen.go.release()
            await seen.client.send(HEAD + b"body")
            reply = await seen.client.reply_to("POST")
    assert reply is not None
    assert reply.body == b"body"
    assert f"aiohttp has no {name}" in caplog.text
