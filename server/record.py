"""Recording: an answer out of an engine's reply, published while it comes."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import orjson

from server import convert
from tiers import Answer, Form

# No engine sends an event as large; what never ends must not fill the memory.
_EVENT_BYTES = 16 * 1024 * 1024


class NotAnAnswerError(Exception):
    """The engine's reply is an error, or nothing that we know; it is passed on and never stored."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body


async def record(
    reply: aiohttp.ClientResponse,
    form: Form,
    publish: Callable[[bytes], Awaitable[None]],
    max_bytes: int,
) -> tuple[Answer, bool]:
    """Read a reply to its end.

    Args:
        reply: to a request that asked for `form`.
        form: a body is published whole, events one by one but for the one with the token counts.
        publish: takes templates (`server.convert`).
        max_bytes: of events more than this are published, but none is kept for the answer.

    Returns:
        The answer, without content if that was too large, and whether it may be stored.

    Raises:
        NotAnAnswerError: the reply isn't an answer.
        ConnectionAbortedError: the stream was cut, or is not what engines send.
    """
    if reply.status != 200:
        raise NotAnAnswerError(reply.status, reply.headers, await reply.read())
    if form is Form.BODY:
        answer, finished = _body(reply, await reply.read())
        await publish(answer.content)
        return answer, finished
    events = _Events(publish, max_bytes)
    async for chunk in _chunks(reply):
        await events.add(chunk)
    return await events.end()


def _body(reply: aiohttp.ClientResponse, raw: bytes) -> tuple[Answer, bool]:
    try:
        parsed = orjson.loads(raw)
        finished = convert.is_finished(parsed["choices"])
        return Answer(Form.BODY, convert.template(parsed)), finished
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as exc:
        raise NotAnAnswerError(reply.status, reply.headers, raw) from exc


class _Events:
    """What is recorded of one stream."""

    def __init__(self, publish: Callable[[bytes], Awaitable[None]], max_bytes: int) -> None:
        self._publish, self._max_bytes = publish, max_bytes
        self._kept: list[bytes] = []
        self._bytes = 0
        self._usage: dict[str, Any] = {}
        self._reasons: dict[int, object] = {}
        # The last event says what only the token counts tell, so one that may be it is kept back.
        self._held = b""

    async def add(self, chunk: dict[str, Any]) -> None:
        """Take the next event; all but the last and the one with the token counts are published."""
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise _error_in_stream(chunk)
        if not choices and chunk.get("usage"):
            self._usage = chunk
            return
        if self._held:
            await self._give(self._held)
            self._held = b""
        event = convert.event(chunk)
        if self._finishes(choices):
            self._held = event
        else:
            await self._give(event)

    async def end(self) -> tuple[Answer, bool]:
        """Publish what was kept back; returns what `record` does."""
        if self._held:
            await self._give(convert.stamped(self._held, self._usage))
        counts = convert.event(self._usage) if self._usage else b""
        if self._bytes > self._max_bytes:
            return Answer(Form.EVENTS, b"", counts), False
        reasons = [{"finish_reason": reason} for reason in self._reasons.values()]
        return Answer(Form.EVENTS, b"".join(self._kept), counts), convert.is_finished(reasons)

    def _finishes(self, choices: list[Any]) -> bool:
        finishes = False
        try:
            for choice in choices:
                reason = choice.get("finish_reason")
                self._reasons[choice["index"]] = reason or self._reasons.get(choice["index"])
                finishes = finishes or bool(reason)
        except (TypeError, KeyError, AttributeError) as exc:
            raise ConnectionAbortedError("the engine's event has no choices as we know") from exc
        return finishes

    async def _give(self, event: bytes) -> None:
        self._bytes += len(event)
        if self._bytes <= self._max_bytes:
            self._kept.append(event)
        await self._publish(event)


async def _chunks(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of each server-sent event up to `[DONE]` (WHATWG HTML, section 9.2)."""
    rest = b""
    async for piece in reply.content.iter_any():
        *parts, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(rest) > _EVENT_BYTES:
            raise ConnectionAbortedError("the engine's event does not end")
        for part in parts:
            fields = [line for line in part.split(b"\n") if line.startswith(b"data:")]
            if not fields:
                continue
            data = b"\n".join(field.removeprefix(b"data:") for field in fields).strip()
            if data == b"[DONE]":
                return
            try:
                chunk = orjson.loads(data)
            except orjson.JSONDecodeError as exc:
                raise ConnectionAbortedError("the engine's event is not JSON") from exc
            if not isinstance(chunk, dict):
                raise ConnectionAbortedError("the engine's event is not an object")
            yield chunk
    raise ConnectionAbortedError("the engine's stream was cut")


def _error_in_stream(chunk: dict[str, Any]) -> NotAnAnswerError:
    """Return the error that an engine reports after it has begun to stream."""
    error = chunk.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    headers = {"Content-Type": "application/json"}
    return NotAnAnswerError(status, headers, orjson.dumps(chunk))
