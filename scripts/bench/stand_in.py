"""An upstream that costs little: it answers each request alike, whatever was asked.

A request for a body is answered at once. A request for a stream gets an event in each step, as vLLM
gives a token to each of its requests in each step, and all of a step's events come together.

Usage: stand_in.py --port N [--answer-bytes N] [--tokens N] [--step-ms N]
"""

import argparse
import asyncio
import re
import sys
from typing import cast

import orjson
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: "


def main() -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer-bytes", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10)
    options = parser.parse_args()
    uvloop.run(_serve(options))
    return 0


async def _serve(options: argparse.Namespace) -> None:
    loop, streams = asyncio.get_running_loop(), _Streams(options.answer_bytes, options.tokens)
    body = _body(options.answer_bytes)
    server = await loop.create_server(lambda: _Connection(body, streams), "127.0.0.1", options.port)
    async with server:
        # The steps keep their pace, however long each takes.
        at = loop.time()
        while True:
            at = max(at + options.step_ms / 1000, loop.time())
            await asyncio.sleep(at - loop.time())
            streams.step()


class _Streams:
    """The streams under way."""

    def __init__(self, answer_bytes: int, tokens: int) -> None:
        text = "why not "[: max(1, answer_bytes // tokens)]
        text *= max(1, answer_bytes // tokens // len(text))
        events = [_event({"role": "assistant", "content": ""})]
        events += [_event({"content": text})] * (tokens - 1)
        usage = {"prompt_tokens": 20, "total_tokens": 20 + tokens, "completion_tokens": tokens}
        last = _event({"content": text}, "stop") + _event(None, usage=usage) + b"data: [DONE]\n\n"
        head = b"text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        self._pieces = [_HEAD + head + _chunk(events[0]), *map(_chunk, events[1:])]
        self._pieces.append(_chunk(last) + _chunk(b""))
        self._at: dict[asyncio.Transport, int] = {}

    def begin(self, transport: asyncio.Transport) -> None:
        """Give a stream its first event in the next step."""
        self._at[transport] = 0

    def drop(self, transport: asyncio.Transport) -> None:
        """Forget a stream whose client has gone."""
        self._at.pop(transport, None)

    def step(self) -> None:
        """Write the next event of each stream."""
        for transport, at in list(self._at.items()):
            transport.write(self._pieces[at])
            if at + 1 < len(self._pieces):
                self._at[transport] = at + 1
            else:
                del self._at[transport]


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, body: bytes, streams: _Streams) -> None:
        self._body, self._streams, self._got = body, streams, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        self._streams.drop(self._transport)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            self._got = b""
            if b'"stream":true' in body:
                self._streams.begin(self._transport)
            else:
                self._transport.write(self._body)


def _event(delta: object, reason: str | None = None, usage: object = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    chunk = {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion.chunk",
             "created": 1700000000, "model": "m", "choices": [choice]}  # fmt: skip
    if usage is not None:
        chunk |= {"choices": [], "usage": usage}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _body(answer_bytes: int) -> bytes:
    message = {"role": "assistant", "content": "why not " * (answer_bytes // 8)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 20, "total_tokens": 120, "completion_tokens": 100}
    body = orjson.dumps(
        {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion", "created": 1700000000,
         "model": "m", "choices": [choice], "usage": usage}
    )  # fmt: skip
    return _HEAD + b"application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


if __name__ == "__main__":
    sys.exit(main())
