"""An engine whose answers name their question, and how often it was asked: no two are the same."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson
from aiohttp import web

from tests.server.conftest import USAGE, Upstream
from tests.waiting import HANGS_S

PRIVATE = "private"
"""A question with this word in it gets an answer that no cache may keep."""
FAILS = "fails"
"""The engine fails at every second time that it is asked a question with this word in it."""
LONG, LONG_BYTES = "long", 300_000
"""A question with this word in it gets an answer of so many bytes."""
_CHOICES = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}
_COUNTS = {"input_tokens": 1, "output_tokens": 4}


class NumberedEngine(Upstream):
    """An upstream that answers the nth time with `QUESTION #n`, in each API's shape.

    It is deterministic: after the same requests it gives the same answer.

    Args:
        padding: bytes that are added to each answer.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self._padding = padding
        self.handler, self.token = self._answer, self._give_token
        self.begun = self.answered = self.tokens = 0
        self.times: Counter[str] = Counter()
        """How often it was asked each question."""
        self._progress = asyncio.Event()

    async def until(self, *, answered: int = 0, tokens: int = 0) -> None:
        """Wait until it has sent so many answers and tokens."""
        async with asyncio.timeout(HANGS_S):
            while self.answered < answered or self.tokens < tokens:
                self._progress.clear()
                await self._progress.wait()

    async def _give_token(self, http: web.Request) -> web.StreamResponse:
        token = {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]}
        response = await self._send(http, web.json_response(token))
        self.tokens += 1
        self._progress.set()
        return response

    async def until_idle(self) -> None:
        """Wait until it has answered all that has come to it whole."""
        await self.until(answered=self.begun)

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        # Requests by the score would stay in memory otherwise.
        self.asked.clear()
        raw = await http.read()
        self.begun += 1
        response = await self._send(http, self._make_answer(http, raw))
        self.answered += 1
        self._progress.set()
        return response

    def _make_answer(self, http: web.Request, raw: bytes) -> web.Response:
        try:
            asked = orjson.loads(raw)
        except ValueError:
            asked = None
        if http.method != "POST" or not isinstance(asked, dict):
            return web.json_response({"error": {"message": "no"}}, status=400)
        text = f"{http.path} {_question_of(asked)}"
        self.times[text] += 1
        number = self.times[text]
        said = f"{text} #{number} " + "." * (LONG_BYTES if LONG in text else self._padding)
        headers = {"Cache-Control": "private"} if PRIVATE in text else {}
        if FAILS in text and number % 2 == 0:
            return web.json_response({"error": {"message": "no"}}, status=500)
        if asked.get("stream") is True and http.path in _STREAMS:
            headers["Content-Type"] = "text/event-stream; charset=utf-8"
            return web.Response(
                body=b"".join(_STREAMS[http.path](http.path, said)), headers=headers
            )
        made = _BODIES.get(http.path, _vectors)(http.path, said)
        return web.json_response(body=orjson.dumps(made), headers=headers)

    async def _send(self, http: web.Request, response: web.Response) -> web.Response:
        """Send all of a response now, so that the server has it before what a test does next."""
        await response.prepare(http)
        await response.write_eof()
        return response


def _question_of(asked: dict[str, Any]) -> str:
    """Return the text of the last prompt, shortened."""
    messages = asked.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    prompt = last.get("content") if isinstance(last, dict) else None
    found = prompt or asked.get("prompt") or asked.get("input")
    return found[:40] if isinstance(found, str) else orjson.dumps(found).decode()[:40]


def _choices(path: str, text: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if path == "/v1/completions":
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text}
    return {
        "id": "x-1", "object": _CHOICES[path], "created": 1, "model": "m", "choices": [choice],
        "usage": USAGE,
    }  # fmt: skip


def _choices_stream(path: str, text: str) -> Iterable[bytes]:
    is_chat = path != "/v1/completions"
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    head = {"id": "x-1", "object": kind, "created": 1, "model": "m"}
    pieces: list[tuple[dict[str, Any], str | None]] = [({"content": text}, None), ({}, "stop")]
    if is_chat:
        pieces.insert(0, ({"role": "assistant", "content": ""}, None))
    for delta, reason in pieces:
        said = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
        yield _data(head | {"choices": [{"index": 0, **said, "finish_reason": reason}]})
    yield _data(head | {"choices": [], "usage": USAGE})
    yield b"data: [DONE]\n\n"


def _response(_: str, text: str) -> dict[str, Any]:
    item = {"id": "msg_1", "type": "message", "content": [{"type": "output_text", "text": text}]}
    return {
        "id": "resp_x", "created_at": 1, "object": "response", "status": "completed",
        "output": [item], "usage": _COUNTS,
    }  # fmt: skip


def _response_stream(path: str, text: str) -> Iterable[bytes]:
    begun = _response(path, text) | {"status": "in_progress", "output": [], "usage": None}
    yield _event("response.created", {"response": begun})
    yield _event("response.output_text.delta", {"item_id": "msg_1", "delta": text})
    yield _event("response.completed", {"response": _response(path, text)})


def _message(_: str, text: str) -> dict[str, Any]:
    return {
        "id": "msg-x", "type": "message", "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn", "usage": _COUNTS,
    }  # fmt: skip


def _message_stream(path: str, text: str) -> Iterable[bytes]:
    begun = _message(path, text) | {"content": [], "stop_reason": None}
    delta = {"type": "text_delta", "text": text}
    yield _event("message_start", {"message": begun})
    yield _event("content_block_delta", {"index": 0, "delta": delta})
    yield _event("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": _COUNTS})
    yield _event("message_stop", {})


def _vectors(_: str, text: str) -> dict[str, Any]:
    return {"id": "embd-x", "object": "list", "created": 1, "model": "m", "data": [text]}


def _data(parsed: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(parsed) + b"\n\n"


def _event(kind: str, parsed: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _data({"type": kind} | parsed)


_BODIES = {
    "/v1/chat/completions": _choices,
    "/v1/completions": _choices,
    "/v1/responses": _response,
    "/v1/messages": _message,
}
_STREAMS = {
    "/v1/chat/completions": _choices_stream,
    "/v1/completions": _choices_stream,
    "/v1/responses": _response_stream,
    "/v1/messages": _message_stream,
}
