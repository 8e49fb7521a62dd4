"""Passing a WebSocket (RFC 6455) through to an engine, message by message."""

import asyncio

import aiohttp
from aiohttp import web

from server.engine.routing.upstreams import Upstreams
from server.engine.upstream import UnavailableError
from server.handlers.rendering import failure, unavailable
from server.handlers.upstream_headers import forwarded_headers
from server.telemetry.served import Served, attach
from server.web.request import HttpRequest, Reply
from server.web.responses import server_headers

# As uvicorn's own limit, under which vLLM runs.
_MESSAGE_BYTES = 16 * 1024**2
_Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


def is_websocket_upgrade(http: HttpRequest) -> bool:
    """Whether the client asks to upgrade the connection to a WebSocket."""
    return http.headers.get("Upgrade", "").lower() == "websocket"


async def forward_websocket(http: HttpRequest, upstreams: Upstreams, model: str) -> Reply:
    """Join the client and an upstream until either closes, and close the other alike."""
    passed = Served("engine", "pass", model)
    error = passed._replace(outcome="error")
    protocols = http.list_header("Sec-WebSocket-Protocol")
    headers = forwarded_headers(http)
    # The two connections shake hands on their own.
    for name in [name for name in headers if name.lower().startswith("sec-websocket-")]:
        del headers[name]
    client = None
    try:
        async with upstreams.websocket(
            http.rel_url.raw_path_qs, headers, protocols, max_bytes=_MESSAGE_BYTES
        ) as engine:
            chosen = (engine.protocol,) if engine.protocol else ()
            client = web.WebSocketResponse(protocols=chosen, max_msg_size=_MESSAGE_BYTES)
            client.headers.update(server_headers(http))
            await client.prepare(http)
            await _join(client, engine)
            return client, passed
    except UnavailableError as exc:
        return unavailable(exc), error
    except aiohttp.WSServerHandshakeError as exc:
        return web.Response(status=exc.status), passed
    except (aiohttp.ClientError, OSError) as exc:
        if client is None:
            return failure(exc), error
        # The client has gone; the engine hasn't failed.
        cut = ConnectionResetError()
        attach(cut, passed)
        raise cut from exc
    except asyncio.CancelledError as exc:
        attach(exc, passed)
        raise


async def _join(*pair: _Socket) -> None:
    pumps = [asyncio.create_task(_pump(*each)) for each in (pair, pair[::-1])]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: _Socket, sink: _Socket) -> None:
    """Pass messages on until the source closes, and then close the sink alike."""
    async for message in source:
        if message.type is aiohttp.WSMsgType.TEXT:
            await sink.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await sink.send_bytes(message.data)
    code = source.close_code
    # 1005 and 1006 stand for a missing code, and can't be sent (section 7.4.1).
    await sink.close(code=code if code and code not in (1005, 1006) else 1000)
