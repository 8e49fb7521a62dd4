"""Recording: makes an answer of an engine's reply, and publishes it while it arrives.

A part of unknown shape is published unchanged, and then the answer isn't kept.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import aiohttp
import orjson
from aiohttp import hdrs

from server.protocol import template
from server.protocol.events import Event, read_events
from server.protocol.formats import CHOICES, OPAQUE, AnswerFormat, Encoding, are_finished
from server.protocol.usage import take_disk_tokens
from tiers import Answer

_CONTENT_TYPES = {Encoding.JSON: "application/json", Encoding.SSE: "text/event-stream"}
_DONE = b"[DONE]"


class NotAnAnswerError(Exception):
    """The engine's reply is an error or has an unknown shape; it is passed on and never stored."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body


class Recorded(NamedTuple):
    """An answer of an engine."""

    answer: Answer
    """Without content if it was too long, or of unknown shape."""
    is_finished: bool
    """Whether it may be stored."""
    disk_tokens: int = 0
    """Tokens of the prompt that the engine took from the prefix tier. A stream doesn't have it."""


async def record_answer(
    reply: aiohttp.ClientResponse,
    pieces: AsyncIterator[bytes],
    format_: AnswerFormat,
    encoding: Encoding,
    publish: Callable[[bytes], Awaitable[None]],
    max_bytes: int,
) -> Recorded:
    """Read a reply to its end.

    Args:
        reply: to a request for `encoding`.
        pieces: of its body, if it is a stream.
        format_: of the route's answers.
        encoding: JSON is published whole, events one by one except the one with the token counts.
        publish: takes templates (`server.protocol.template`), and verbatim parts that don't belong
            to the answer. A stream begins with an empty template.
        max_bytes: a longer stream is published, but not kept for the answer.

    Raises:
        NotAnAnswerError: the reply isn't an answer.
        ConnectionAbortedError: the stream was cut.
    """
    coding = reply.headers.get(hdrs.CONTENT_ENCODING, "identity")
    if (reply.status, reply.content_type, coding) != (200, _CONTENT_TYPES[encoding], "identity"):
        raise NotAnAnswerError(reply.status, reply.headers, await reply.read())
    if encoding == Encoding.JSON:
        recorded = _body(reply, format_, await reply.read())
        await publish(recorded.answer.content)
        return recorded
    await publish(b"")
    if format_ is CHOICES:
        events: _ChoiceEvents | _TypedEvents = _ChoiceEvents(publish, max_bytes)
    else:
        events = _TypedEvents(format_, publish, max_bytes)
    async for event in read_events(pieces):
        if await events.take(event):
            break
    return await events.end()


def _body(reply: aiohttp.ClientResponse, format_: AnswerFormat, raw: bytes) -> Recorded:
    disk_tokens = 0
    try:
        if format_ is OPAQUE:
            content, finished = template.template_of_raw(raw), True
        else:
            parsed = orjson.loads(raw)
            finished = format_.is_finished(parsed) and not parsed.get("error")
            disk_tokens = take_disk_tokens(parsed)
            content = template.json_template(parsed, format_.marks)
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as exc:
        raise NotAnAnswerError(reply.status, reply.headers, raw) from exc
    if content is None:
        raise NotAnAnswerError(reply.status, reply.headers, raw)
    return Recorded(Answer(Encoding.JSON, content), finished, disk_tokens)


class _Events:
    """The events of one stream: publishes them, and keeps them for the answer."""

    def __init__(self, publish: Callable[[bytes], Awaitable[None]], max_bytes: int) -> None:
        self._publish, self._max_bytes = publish, max_bytes
        self._kept: list[bytes] = []
        self._bytes = 0
        self._is_understood = True

    async def _keep(self, event: bytes) -> None:
        self._bytes += len(event)
        if self._bytes <= self._max_bytes:
            self._kept.append(event)
        await self._publish(event)

    async def _publish_verbatim(self, event: Event) -> None:
        """Publish a comment, or an event of unknown shape, which is no part of the answer."""
        if event.data:
            self._is_understood = False
        if event.is_whole:
            await self._publish(template.Verbatim(event.raw))

    def _answer(self, usage: bytes = b"", *, finished: bool) -> Recorded:
        if self._bytes > self._max_bytes or not self._is_understood:
            return Recorded(Answer(Encoding.SSE, b"", usage), is_finished=False)
        return Recorded(Answer(Encoding.SSE, b"".join(self._kept), usage), finished)


class _TypedEvents(_Events):
    """A stream of events with types, of which the last one ends it."""

    def __init__(
        self, format_: AnswerFormat, publish: Callable[[bytes], Awaitable[None]], max_bytes: int
    ) -> None:
        super().__init__(publish, max_bytes)
        self._format = format_
        self._finished = False
        self._last: Any = ""

    async def take(self, event: Event) -> bool:
        """Take the next event and publish it; returns whether it ends the stream."""
        format_ = self._format
        try:
            chunk = orjson.loads(event.data)
            kind = chunk.get("type", "")
            verdict = format_.finish_events.get(kind)
            self._last = kind
            if verdict is not None:
                self._finished = format_.is_finished(chunk[verdict])
            made = template.sse_event(chunk, format_, event.lines)
        except (AttributeError, KeyError, TypeError, ValueError):
            await self._publish_verbatim(event)
        else:
            await self._keep(made)
        return False

    async def end(self) -> Recorded:
        """Return the answer."""
        if self._last in self._format.last_events:
            return self._answer(finished=self._finished)
        if self._last in self._format.failure_events:
            return self._answer(finished=False)
        raise ConnectionAbortedError("the engine's stream was cut")


class _ChoiceEvents(_Events):
    """A stream of chat completions or completions."""

    def __init__(self, publish: Callable[[bytes], Awaitable[None]], max_bytes: int) -> None:
        super().__init__(publish, max_bytes)
        self._usage: dict[str, Any] = {}
        self._reasons: dict[int, object] = {}
        self._is_done = False
        # The last event gets its fingerprint from the token counts that follow, so an event that
        # may be the last is held back. So are the counts, since not every client asks for them.
        self._held = self._counts = b""

    async def take(self, event: Event) -> bool:
        """Take the next event; returns whether it ends the stream.

        All but the last and the one with the token counts are published.

        Raises:
            NotAnAnswerError: it is an error.
        """
        if event.data.strip() == _DONE:
            self._is_done = True
            return True
        try:
            chunk = orjson.loads(event.data)
            choices, usage = chunk.get("choices"), chunk.get("usage")
            if chunk.get("error"):
                if not isinstance(choices, list):
                    await self._publish_held()
                    raise _error_in_stream(chunk)
                raise ValueError("a choice with an error is no answer")
            is_count = choices in (None, []) and isinstance(usage, dict)
            reasons = {} if is_count else {c["index"]: c.get("finish_reason") for c in choices}
            made = template.sse_event(chunk, lines=event.lines)
        except (AttributeError, KeyError, TypeError, ValueError):
            if event.data:
                await self._publish_held()
            await self._publish_verbatim(event)
            return False
        if self._counts or not is_count:
            await self._publish_held()
        for index, reason in reasons.items():
            self._reasons[index] = reason or self._reasons.get(index)
        if is_count:
            self._usage, self._counts = chunk, made
        elif any(reasons.values()):
            self._held = made
        else:
            await self._keep(made)
        return False

    async def _publish_held(self) -> None:
        """Publish the held events, since more events follow."""
        held, self._held = self._held, b""
        counts, self._counts, self._usage = self._counts, b"", {}
        for event in (held, counts):
            if event:
                await self._keep(event)

    async def end(self) -> Recorded:
        """Publish the held event, and return the answer."""
        if self._held:
            await self._keep(template.with_fingerprint(self._held, self._usage))
        reasons = [{"finish_reason": reason} for reason in self._reasons.values()]
        if not self._is_done:
            # The upstream sends no `[DONE]`, or was cut before the counts.
            self._is_understood = False
            if not reasons or None in self._reasons.values():
                raise ConnectionAbortedError("the engine's stream was cut")
        return self._answer(self._counts, finished=are_finished(reasons))


def _error_in_stream(chunk: dict[str, Any]) -> NotAnAnswerError:
    """Return the error that an engine reports after it has begun to stream."""
    error = chunk.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    headers = {"Content-Type": "application/json"}
    return NotAnAnswerError(status, headers, orjson.dumps(chunk))
