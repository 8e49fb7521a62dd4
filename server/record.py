"""Recording: an answer out of an engine's reply, published while it comes."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import orjson

from server import convert
from server.shapes import CHOICES, FLAT, Shape, are_finished
from tiers import Answer, Form

# No engine sends an event as large; what never ends must not fill the memory.
_EVENT_BYTES = 16 * 1024 * 1024
_CONTENT_TYPES = {Form.BODY: "application/json", Form.EVENTS: "text/event-stream"}


class NotAnAnswerError(Exception):
    """The engine's reply is an error, or nothing that we know; it is passed on and never stored."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body


async def record(
    reply: aiohttp.ClientResponse,
    shape: Shape,
    form: Form,
    publish: Callable[[bytes], Awaitable[None]],
    max_bytes: int,
) -> tuple[Answer, bool]:
    """Read a reply to its end.

    Args:
        reply: to a request that asked for `form`.
        shape: how an answer of this route looks.
        form: a body is published whole, events one by one but for the one with the token counts.
        publish: takes templates (`server.convert`); of a stream first an empty one, which says that
            it begins.
        max_bytes: of events more than this are published, but none is kept for the answer.

    Returns:
        The answer, without content if that was too large, and whether it may be stored.

    Raises:
        NotAnAnswerError: the reply isn't an answer.
        ConnectionAbortedError: the stream was cut, or is not what engines send.
    """
    if reply.status != 200 or reply.content_type != _CONTENT_TYPES[form]:
        raise NotAnAnswerError(reply.status, reply.headers, await reply.read())
    if form is Form.BODY:
        answer, finished = _body(reply, shape, await reply.read())
        await publish(answer.content)
        return answer, finished
    await publish(b"")
    if shape is CHOICES:
        events: _Choices | _Typed = _Choices(publish, max_bytes)
    else:
        events = _Typed(shape, publish, max_bytes)
    async for kind, chunk in _chunks(reply, endless=not shape.done):
        await events.add(kind, chunk)
    return await events.end()


def _body(reply: aiohttp.ClientResponse, shape: Shape, raw: bytes) -> tuple[Answer, bool]:
    try:
        if shape is FLAT:
            content, finished = convert.flat(raw), True
        else:
            parsed = orjson.loads(raw)
            finished = shape.is_finished(parsed)
            content = convert.template(parsed, shape.fresh)
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as exc:
        raise NotAnAnswerError(reply.status, reply.headers, raw) from exc
    if content is None:
        raise NotAnAnswerError(reply.status, reply.headers, raw)
    return Answer(Form.BODY, content), finished


class _Events:
    """What is kept of one stream, and published."""

    def __init__(self, publish: Callable[[bytes], Awaitable[None]], max_bytes: int) -> None:
        self._publish, self._max_bytes = publish, max_bytes
        self._kept: list[bytes] = []
        self._bytes = 0

    async def _give(self, event: bytes) -> None:
        self._bytes += len(event)
        if self._bytes <= self._max_bytes:
            self._kept.append(event)
        await self._publish(event)

    def _answer(self, usage: bytes = b"", *, finished: bool) -> tuple[Answer, bool]:
        if self._bytes > self._max_bytes:
            return Answer(Form.EVENTS, b"", usage), False
        return Answer(Form.EVENTS, b"".join(self._kept), usage), finished


class _Typed(_Events):
    """A stream whose events have types, of which the last one says that it ends."""

    def __init__(
        self, shape: Shape, publish: Callable[[bytes], Awaitable[None]], max_bytes: int
    ) -> None:
        super().__init__(publish, max_bytes)
        self._shape = shape
        self._finished = False
        self._last = ""

    async def add(self, kind: bytes, chunk: dict[str, Any]) -> None:
        """Take the next event and publish it."""
        shape, self._last = self._shape, chunk.get("type", "")
        try:
            if (verdict := shape.verdicts.get(self._last)) is not None:
                self._finished = shape.is_finished(chunk[verdict])
            event = convert.event(chunk, shape, kind)
        except (TypeError, KeyError, AttributeError) as exc:
            raise ConnectionAbortedError("the engine's event is not as we know it") from exc
        await self._give(event)

    async def end(self) -> tuple[Answer, bool]:
        """Return what `record` does."""
        if self._last in self._shape.last:
            return self._answer(finished=self._finished)
        if self._last in self._shape.failed:
            return self._answer(finished=False)
        raise ConnectionAbortedError("the engine's stream was cut")


class _Choices(_Events):
    """A stream of chat completions or completions."""

    def __init__(self, publish: Callable[[bytes], Awaitable[None]], max_bytes: int) -> None:
        super().__init__(publish, max_bytes)
        self._usage: dict[str, Any] = {}
        self._reasons: dict[int, object] = {}
        # The last event says what only the token counts tell, so one that may be it is kept back.
        self._held = b""

    async def add(self, _: bytes, chunk: dict[str, Any]) -> None:
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
        reasons = [{"finish_reason": reason} for reason in self._reasons.values()]
        return self._answer(counts, finished=are_finished(reasons))

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


async def _chunks(
    reply: aiohttp.ClientResponse, *, endless: bool
) -> AsyncIterator[tuple[bytes, dict[str, Any]]]:
    """Yield type and data of each server-sent event up to `[DONE]` (WHATWG HTML, section 9.2).

    A stream that ends without one was cut, unless it is `endless`.
    """
    rest = b""
    async for piece in reply.content.iter_any():
        *parts, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(rest) > _EVENT_BYTES:
            raise ConnectionAbortedError("the engine's event does not end")
        for part in parts:
            data, kind = _fields(part, b"data:"), _fields(part, b"event:")
            if not data:
                continue
            if data == b"[DONE]":
                return
            try:
                chunk = orjson.loads(data)
            except orjson.JSONDecodeError as exc:
                raise ConnectionAbortedError("the engine's event is not JSON") from exc
            if not isinstance(chunk, dict):
                raise ConnectionAbortedError("the engine's event is not an object")
            yield kind, chunk
    if not endless or rest.strip():
        raise ConnectionAbortedError("the engine's stream was cut")


def _fields(event: bytes, name: bytes) -> bytes:
    lines = [line for line in event.split(b"\n") if line.startswith(name)]
    return b"\n".join(line.removeprefix(name) for line in lines).strip()


def _error_in_stream(chunk: dict[str, Any]) -> NotAnAnswerError:
    """Return the error that an engine reports after it has begun to stream."""
    error = chunk.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    headers = {"Content-Type": "application/json"}
    return NotAnAnswerError(status, headers, orjson.dumps(chunk))
