"""Reads answers as they arrive: when tokens came, what they cost, and whether all of it came.

An event with content is what vLLM's `bench serve` takes for one: an event of Chat Completions or
Completions with a choice in it, a delta of text or reasoning in Responses, and, since that program
doesn't know Messages, each delta of a block there. Whole answers are bodies with one such event.

Events that bytes tell apart aren't parsed: a replayed answer brings thousands in one packet.
"""

import re
from collections.abc import Mapping
from math import nan
from typing import Any, Protocol

import orjson

from server.bench.records import Failure

MOST_BYTES = 64 * 1024 * 1024
"""The longest body that is kept."""
MOST_EVENT_BYTES = 4 * 1024 * 1024
"""The longest event."""
_PARSED_BYTES = 256 * 1024
_TAIL_BYTES = 4096
_DONE = b"[DONE]"
_USAGE = b'"usage":{'
_DELTAS = frozenset(
    {"response.output_text.delta", "response.reasoning_text.delta", "content_block_delta"}
)
_ENDS = frozenset({"response.completed", "response.incomplete", "message_stop"})
_ERRORS = frozenset({"error", "response.failed"})
_ANSWER_FIELDS = frozenset({"choices", "output", "content", "data"})
# A quote within a JSON string is escaped, so these can't stand in a text.
_MARKS = (
    ("/responses", b'"type":"response.output_text.delta"'),
    ("/messages", b'"type":"content_block_delta"'),
    ("", b'"choices":[{'),
)
_counts = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')


class TokenCounts:
    """Token counts of an answer; -1 where it tells none."""

    __slots__ = ("cached_tokens", "completion_tokens", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = -1

    def take(self, counts: object) -> None:
        """Take the counts of a `usage`; those that it leaves out stay."""
        if not isinstance(counts, dict):
            return
        prompt = counts.get("prompt_tokens", counts.get("input_tokens"))
        completion = counts.get("completion_tokens", counts.get("output_tokens"))
        details = counts.get("prompt_tokens_details") or counts.get("input_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        read = counts.get("cache_read_input_tokens")
        if isinstance(read, int):
            # In Messages, `input_tokens` leaves out what a cache held.
            cached, made = read, counts.get("cache_creation_input_tokens")
            if isinstance(prompt, int):
                prompt += read + (made if isinstance(made, int) else 0)
        self.prompt_tokens = _number(prompt, self.prompt_tokens)
        self.completion_tokens = _number(completion, self.completion_tokens)
        self.cached_tokens = _number(cached, self.cached_tokens)


class Reader(Protocol):
    """Reads one answer.

    Attributes:
        first_token, last_token: when the first and last event with content came; NaN before.
        chunks: events with content. gaps: the seconds between them, 0 within a packet.
        usage: token counts.
    """

    first_token: float
    last_token: float
    chunks: int
    gaps: list[float]
    usage: TokenCounts

    def feed(self, data: bytes, now: float) -> None:
        """Take what a packet held."""
        ...

    def end(self) -> Failure:
        """Take the end of the answer; returns what is wrong with it."""
        ...


def reader(path: str, *, stream: bool) -> Reader:
    """Return a reader for the answer to a request."""
    return StreamReader(path) if stream else BodyReader()


class BodyReader:
    """Reads a JSON body, whose content comes with its last byte."""

    __slots__ = (
        "_last_byte", "_pieces", "_size", "chunks", "first_token", "gaps", "last_token", "usage"
    )  # fmt: skip

    def __init__(self) -> None:
        self.first_token = self.last_token = nan
        self.chunks, self.usage = 0, TokenCounts()
        self.gaps: list[float] = []
        self._pieces: list[bytes] = []
        self._size, self._last_byte = 0, nan

    def feed(self, data: bytes, now: float) -> None:
        self._size += len(data)
        if self._size <= MOST_BYTES:
            self._pieces.append(data)
            self._last_byte = now

    def end(self) -> Failure:
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        if self._size > MOST_BYTES or not self._read(body):
            return Failure.CONTENT
        self.first_token = self.last_token = self._last_byte
        self.chunks = 1
        return Failure.NONE

    def _read(self, body: bytes) -> bool:
        """Take the counts of a body; returns whether it is an answer."""
        if len(body) > _PARSED_BYTES:
            # Parsing it, such as many embeddings, would keep the loop for milliseconds.
            ends = body[:_TAIL_BYTES], body[-_TAIL_BYTES:]
            for end in ends:
                if found := _counts.search(end):
                    self.usage.take(_parsed(found[1]))
            return ends[0].lstrip().startswith(b"{") and ends[1].rstrip().endswith(b"}")
        answer = _parsed(body)
        if answer is None or answer.get("error") or _ANSWER_FIELDS.isdisjoint(answer):
            return False
        self.usage.take(answer.get("usage"))
        return True


class StreamReader:
    """Reads server-sent events.

    Args:
        path: the route, which tells by what an event with content is known.
    """

    __slots__ = (
        "_failure", "_has_ended", "_last_byte", "_mark", "_rest", "chunks", "first_token", "gaps",
        "last_token", "usage",
    )  # fmt: skip

    def __init__(self, path: str) -> None:
        self.first_token = self.last_token = nan
        self.chunks, self.usage = 0, TokenCounts()
        self.gaps: list[float] = []
        self._mark = next(mark for end, mark in _MARKS if path.endswith(end))
        self._rest, self._last_byte = b"", nan
        self._failure, self._has_ended = Failure.NONE, False

    def feed(self, data: bytes, now: float) -> None:
        self._last_byte = now
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            # A line may end in CR, LF or both; the second half of both may come later.
            split = data.endswith(b"\r")
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            data += b"\r" * split
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = data
        else:
            self._rest = data[end:]
            self._read(data if len(data) == end else data[:end], now)
        if len(self._rest) > MOST_EVENT_BYTES:
            self._rest, self._failure = b"", Failure.CONTENT

    def end(self) -> Failure:
        # Some servers end without a blank line.
        self._read_each(self._rest.replace(b"\r", b"\n"), self._last_byte)
        self._rest = b""
        if self._failure is Failure.NONE and not (self._has_ended and self.chunks):
            return Failure.CONTENT
        return self._failure

    def _read(self, data: bytes, now: float) -> None:
        """Read whole events. Those with content mostly follow one another, and are just counted."""
        mark = self._mark
        first = data.find(mark)
        if first >= 0:
            before = data.rfind(b"\n\n", 0, first)
            begin = before + 2 if before >= 0 else 0
            end = data.find(b"\n\n", data.rfind(mark)) + 2
            middle = data[begin:end]
            count = middle.count(mark)
            # Events alike have as many lines; counting these is cheaper than counting events.
            lines = middle.count(b"\n", 0, middle.find(b"\n\n") + 2)
            if middle.count(b"\n") == count * lines:
                self._read_each(data[:begin], now)
                self._note_content(count, now)
                if (at := middle.rfind(_USAGE)) >= 0:
                    self._take_usage(middle, at)
                self._read_each(data[end:], now)
                return
        self._read_each(data, now)

    def _read_each(self, data: bytes, now: float) -> None:
        for event in data.split(b"\n\n"):
            if self._mark in event and _USAGE not in event:
                self._note_content(1, now)
            elif (content := _data_of(event)) == _DONE:
                self._has_ended = True
            elif content:
                self._read_parsed(_parsed(content), now)

    def _read_parsed(self, event: Mapping[str, Any] | None, now: float) -> None:
        if event is None:
            self._failure = self._failure or Failure.CONTENT
            return
        kind = event.get("type")
        if event.get("error") or kind in _ERRORS:
            self._failure = Failure.IN_ANSWER
        elif event.get("choices") or kind in _DELTAS:
            self._note_content(1, now)
        elif kind in _ENDS:
            self._has_ended = True
        # Responses and Messages wrap the answer that begins or ends.
        for answer in (event, event.get("response"), event.get("message")):
            if isinstance(answer, dict):
                self.usage.take(answer.get("usage"))

    def _take_usage(self, events: bytes, at: int) -> None:
        """Take the counts that stand at a place: some servers tell them with each token."""
        start, end = events.rfind(b"\n\n", 0, at), events.find(b"\n\n", at)
        event = _parsed(_data_of(events[max(start, 0) : end].strip()))
        self.usage.take(event.get("usage") if event else None)

    def _note_content(self, count: int, now: float) -> None:
        if self.chunks:
            self.gaps.append(now - self.last_token)
        else:
            self.first_token = now
        if count > 1:
            self.gaps += [0.0] * (count - 1)
        self.last_token = now
        self.chunks += count


def _data_of(event: bytes) -> bytes:
    """Return the data of an event; nothing of a comment."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:].strip()
    lines = (line[5:] for line in event.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(lines).strip()


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _number(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
