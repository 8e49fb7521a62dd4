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
    reply: aiohttp.ClientResponse, form: Form, publish: Callable[[bytes], Awaitable[None]]
) -> tuple[Answer, bool]:
    """Read a reply to its end.

    Args:
        reply: to a request that asked for `form`.
        form: a body is published whole, events one by one but for the one with the token counts.
        publish: takes templates (`server.convert`).

    Returns:
        The answer, and whether it is finished and may be stored.

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
    return await _events(reply, publish)


def _body(reply: aiohttp.ClientResponse, raw: bytes) -> tuple[Answer, bool]:
    try:
        parsed = orjson.loads(raw)
        finished = convert.is_finished(parsed["choices"])
        return Answer(Form.BODY, convert.template(parsed)), finished
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as exc:
        raise NotAnAnswerError(reply.status, reply.headers, raw) from exc


async def _events(
    reply: aiohttp.ClientResponse, publish: Callable[[bytes], Awaitable[None]]
) -> tuple[Answer, bool]:
    events: list[bytes] = []
    usage = b""
    reasons: dict[int, object] = {}
    async for chunk in _chunks(reply):
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise _error_in_stream(chunk)
        event = convert.event(chunk)
        if not choices and chunk.get("usage"):
            usage = event
            continue
        try:
            for choice in choices:
                index = choice["index"]
                reasons[index] = choice.get("finish_reason") or reasons.get(index)
        except (TypeError, KeyError, AttributeError) as exc:
            raise ConnectionAbortedError("the engine's event has no choices as we know") from exc
        events.append(event)
        await publish(event)
    finished = convert.is_finished([{"finish_reason": reason} for reason in reasons.values()])
    return Answer(Form.EVENTS, b"".join(events), usage), finished


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
