"""Bodies and event streams, however they are cut."""

import math
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.clients.answers import MOST_BYTES, MOST_EVENT_BYTES, reader
from server.bench.records import Failure

from .workloads_of_tests import CHAT

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
DONE = b"data: [DONE]\n\n"


def event(data: dict, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


def chunk(text: str, **more) -> bytes:
    return event({"id": "x", "choices": [{"index": 0, "delta": {"content": text}}], **more})


USAGE = {
    "prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}
}  # fmt: skip
CHAT_STREAM = b"".join(
    (chunk(""), chunk("a"), chunk('"choices":[{ data: [DONE]'),
     event({"choices": [], "usage": USAGE}), DONE)
)  # fmt: skip
RESPONSES_STREAM = b"".join(
    event(data, data["type"])
    for data in (
        {"type": "response.created", "response": {"usage": None}},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.output_text.delta", "delta": "b"},
        {"type": "response.reasoning_text.delta", "delta": "c"},
        {"type": "response.output_text.done", "text": "ab"},
        {"type": "response.completed", "response": {"error": None, "usage": {
            "input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 8}}}},
    )
)  # fmt: skip
MESSAGES_STREAM = b"".join(
    event(data, data["type"])
    for data in (
        {"type": "message_start", "message": {"usage": {
            "input_tokens": 1, "output_tokens": 0, "cache_read_input_tokens": 8}}},
        {"type": "content_block_start", "index": 0},
        {"type": "ping"},
        {"type": "content_block_delta", "delta": {"text": "a"}},
        {"type": "content_block_delta", "delta": {"text": "b"}},
        {"type": "content_block_delta", "delta": {"text": "c"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    )
)  # fmt: skip
STREAMS = {
    CHAT: CHAT_STREAM,
    "/v1/completions": CHAT_STREAM,
    RESPONSES: RESPONSES_STREAM,
    MESSAGES: MESSAGES_STREAM,
}


def read(path: str, *pieces: bytes, stream: bool = True):
    """Read pieces that come at 1, 2, … s; returns the reader and what is wrong."""
    found = reader(path, stream=stream)
    for number, piece in enumerate(pieces, 1):
        found.feed(piece, float(number))
    return found, found.end()


def counts(found) -> tuple[int, int, int]:
    return found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.cached_tokens


@pytest.mark.parametrize("path", STREAMS)
@given(data=st.data())
def test_streams_cut_anywhere(path, data) -> None:
    whole = STREAMS[path]
    if data.draw(st.booleans()):
        whole = whole.replace(b"\n", b"\r\n")
    if data.draw(st.booleans()):
        whole = b": ping\n\n" + whole.replace(b"}\n\n", b"}\n\n: ping\n\n")
    if data.draw(st.booleans()):
        whole = whole.replace(b'":', b'": ')
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=8)))
    edges = [0, *cuts, len(whole)]
    pieces = [whole[begin:end] for begin, end in pairwise(edges)]
    found, failure = read(path, *pieces)
    assert failure is Failure.NONE
    assert found.chunks == 3
    assert len(found.gaps) == 2
    assert sum(found.gaps) == found.last_token - found.first_token
    assert counts(found) == (9, 3, 8)


@pytest.mark.parametrize("path", STREAMS)
def test_each_event_of_its_own(path) -> None:
    pieces = [piece + b"\n\n" for piece in STREAMS[path].split(b"\n\n")[:-1]]
    found, failure = read(path, *pieces)
    assert failure is Failure.NONE
    assert found.gaps == [1, 1]
    assert found.last_token == found.first_token + 2


@pytest.mark.parametrize("path", STREAMS)
@given(data=st.data())
def test_a_cut_stream_is_not_whole(path, data) -> None:
    whole = STREAMS[path]
    # The last event may lack its blank line, but nothing else.
    end = data.draw(st.integers(0, len(whole.rstrip()) - 1))
    assert read(path, whole[:end])[1] is Failure.CONTENT


def test_a_last_event_needs_no_blank_line() -> None:
    found, failure = read(CHAT, chunk("a") + b"data: [DONE]")
    assert (found.chunks, failure) == (1, Failure.NONE)


def test_thousands_of_events_in_one_packet() -> None:
    whole = chunk("a") * 5000 + event({"choices": [], "usage": USAGE}) + DONE
    found, failure = read(CHAT, whole)
    assert (found.chunks, failure) == (5000, Failure.NONE)
    assert found.gaps == [0.0] * 4999
    assert counts(found) == (9, 3, 8)


def test_counts_that_come_with_each_token() -> None:
    events = [chunk("a", usage=USAGE | {"completion_tokens": number}) for number in range(1, 30)]
    found, failure = read(CHAT, b"".join(events) + DONE)
    assert (found.chunks, failure) == (29, Failure.NONE)
    assert counts(found) == (9, 29, 8)


ERROR = event({"error": {"message": "no"}})


@pytest.mark.parametrize(
    ("path", "stream", "expected"),
    [
        (CHAT, chunk("a") + ERROR, Failure.IN_ANSWER),
        (CHAT, chunk("a") + ERROR + DONE, Failure.IN_ANSWER),
        (CHAT, chunk("a") * 3 + ERROR + chunk("a") + DONE, Failure.IN_ANSWER),
        (RESPONSES, event({"type": "response.failed"}), Failure.IN_ANSWER),
        (MESSAGES, event({"type": "error", "error": {}}, "error"), Failure.IN_ANSWER),
        (CHAT, DONE, Failure.CONTENT),
        (CHAT, b"", Failure.CONTENT),
        (CHAT, chunk("a") + b"data: nonsense\n\n" + DONE, Failure.CONTENT),
        (CHAT, chunk("a") + b"data: [1]\n\n" + DONE, Failure.CONTENT),
        (CHAT, b"<html>\n\nnothing</html>", Failure.CONTENT),
        (CHAT, b'{"choices":[{}]}', Failure.CONTENT),
        (CHAT, b"\x00\xff" * 100, Failure.CONTENT),
        (CHAT, b"data: " + b"x" * (MOST_EVENT_BYTES + 1), Failure.CONTENT),
    ],
)
def test_streams_that_fail(path, stream, expected) -> None:
    assert read(path, stream)[1] is expected


@given(st.lists(st.binary(max_size=50) | st.sampled_from([b"data:", b"\n\n", b"{", b"}", DONE])))
def test_nonsense_raises_nothing(pieces) -> None:
    read(CHAT, *pieces)
    read(MESSAGES, *pieces)
    read(CHAT, *pieces, stream=False)


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{}], "usage": USAGE},
        {"data": [{"embedding": [0.5] * 100_000}], "usage": USAGE},
        {"usage": USAGE, "data": [{"embedding": [0.5] * 100_000}]},
        {"output": [], "error": None, "usage": {
            "input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 8}}},
        {"content": [], "usage": {
            "input_tokens": 1, "output_tokens": 3, "cache_read_input_tokens": 8,
            "cache_creation_input_tokens": None}},
    ],
)  # fmt: skip
def test_bodies(answer) -> None:
    body = orjson.dumps(answer)
    found, failure = read(CHAT, body[:20], body[20:], stream=False)
    assert failure is Failure.NONE
    assert (found.first_token, found.last_token, found.chunks, found.gaps) == (2, 2, 1, [])
    assert counts(found) == (9, 3, 8)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"{}", b"nonsense", CHAT_STREAM, b'{"error":{"message":"no"}}',
        b'{"choices":[],' + b" " * 300_000, b"x" * 300_000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_fail(body) -> None:
    found, failure = read(CHAT, body, stream=False)
    assert failure is Failure.CONTENT
    assert (found.chunks, math.isnan(found.first_token)) == (0, True)


def test_an_endless_body_is_not_kept() -> None:
    piece = b" " * (MOST_BYTES // 8)
    assert read(CHAT, *[piece] * 9, b'{"choices":[]}', stream=False)[1] is Failure.CONTENT


def test_an_answer_without_counts() -> None:
    found, _ = read(CHAT, b'{"choices":[],"usage":{"prompt_tokens":"many"}}', stream=False)
    assert counts(found) == (-1, -1, -1)
