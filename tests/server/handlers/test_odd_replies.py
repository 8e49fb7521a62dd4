"""Replies that are odd but real: what we don't understand is passed on as it is, and not kept."""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from tests.server.conftest import (
    ROLE,
    USAGE,
    WHOLE,
    Front,
    Upstream,
    answer,
    body,
    chunk,
    question,
    stream,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

YES, END, COUNTS, DONE = WHOLE[1:]
HEAD = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_FRESH = re.compile(rb'"id":"chatcmpl-[^"]+","object":"chat.completion.chunk","created":\d+')


def event(**more: Any) -> bytes:
    return b"data: " + orjson.dumps(HEAD | more) + b"\n\n"


def sends(*pieces: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(http: web.Request) -> web.StreamResponse:
        return await stream(http, *pieces)

    return handler


def as_sent(text: bytes) -> bytes:
    """Return a stream with the engine's id and time."""
    return _FRESH.sub(b'"id":"chatcmpl-x","object":"chat.completion.chunk","created":1', text)


async def asked_twice(front: Front, asked: dict, *, kept: bool) -> list[bytes]:
    """Return what a miss gets, and what the next one gets, which is a hit if that was kept."""
    texts = []
    for how in ("fwd=miss", "hit" if kept else "fwd=miss"):
        status, cache_status, text = await front.ask_alone(asked)
        assert (status, how in cache_status) == (200, True), (cache_status, text)
        texts.append(text)
    return texts


@pytest.mark.parametrize(
    "odd",
    [
        b'data: {"type":"ping"}\n\n',
        b"data: hello\n\n",
        b"data: {\n\n",
        b"data: []\r\r",
        b"data: null\r\n\r\n",
        b'event: x\nid: 1\ndata: {"choices":[{}]}\n\n',
        event(choices=None),
        event(choices=[{"delta": {"content": "yes"}}]),
        event(choices=[None]),
        event(choices={"index": 0}),
        event(choices=[], error={"message": "no"}),
        b"data: \x00\x01\x02\x03\n\n",
        b"id: \x00\x01\x02\x03\n" + YES,
    ],
)
async def test_an_event_that_is_not_understood(
    front: Front, upstream: Upstream, odd: bytes
) -> None:
    upstream.handler = sends(ROLE, odd, YES, END, odd, COUNTS, DONE)
    for text in await asked_twice(front, question(**WITH_USAGE), kept=False):
        assert as_sent(text) == b"".join((ROLE, odd, YES, END, odd, COUNTS, DONE))
    assert len(upstream.asked) == 2


async def test_a_body_with_an_error_in_it(front: Front, upstream: Upstream) -> None:
    async def cut_off(_: web.Request) -> web.StreamResponse:
        return web.json_response(body() | {"error": {"message": "no"}})

    upstream.handler = cut_off
    for text in await asked_twice(front, question(), kept=False):
        assert orjson.loads(text)["error"] == {"message": "no"}


FILTERS = [{"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False}}}]
AZURES = event(choices=[], model="", prompt_filter_results=FILTERS)


@pytest.mark.parametrize(
    ("pieces", "same"),
    [
        (WHOLE, b"".join(WHOLE)),
        ([piece.replace(b"\n", b"\r") for piece in WHOLE], b"".join(WHOLE)),
        ([piece.replace(b"\n", b"\r\n") for piece in WHOLE], b"".join(WHOLE)),
        ([b"\xef\xbb\xbf" + ROLE, *WHOLE[1:]], b"".join(WHOLE)),
        ([ROLE[:9], ROLE[9:-1], b"\n" + YES[:-2], *YES[-2:].split(b"-"), END, COUNTS, DONE[:-2]],
         b"".join(WHOLE)),
        ([ROLE, YES.replace(b",", b",\ndata: ", 1), END, COUNTS, DONE], b"".join(WHOLE)),
        ([ROLE, b"event: x\nid: 7\nretry: 1\n" + YES, END, COUNTS, DONE], None),
        ([AZURES, *WHOLE], None),
        ([ROLE, YES, END, event(usage=USAGE), DONE], None),
        ([ROLE, YES, END, event(choices=None, usage=USAGE), DONE], None),
        ([ROLE, COUNTS, YES, COUNTS, END, DONE], None),
        ([ROLE, YES, END, COUNTS, event(choices=[], usage=USAGE | {"cost": 1}), DONE], None),
        ([ROLE, YES, event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}],
                           usage=USAGE), DONE], None),
    ],
)  # fmt: skip
async def test_an_odd_stream_that_is_understood_is_kept(
    front: Front, upstream: Upstream, pieces: list[bytes], same: bytes | None
) -> None:
    upstream.handler = sends(*pieces)
    for text in await asked_twice(front, question(**WITH_USAGE), kept=True):
        assert as_sent(text) == (same or b"".join(pieces))
    assert len(upstream.asked) == 1


async def test_comments_are_passed_on_and_not_kept(front: Front, upstream: Upstream) -> None:
    upstream.handler = sends(b": ping\n\n", ROLE, b"retry: 7\n\n", *WHOLE[1:])
    miss, hit = await asked_twice(front, question(**WITH_USAGE), kept=True)
    assert miss.startswith(b": ping\n\ndata: ")
    assert miss.replace(b": ping\n\n", b"").replace(b"retry: 7\n\n", b"").count(b"\n\n") == 5
    assert as_sent(hit) == b"".join(WHOLE)


@pytest.mark.parametrize("reason", ["stop", "abort"])
async def test_a_stream_that_only_lacks_its_done_is_whole(
    front: Front, upstream: Upstream, reason: str
) -> None:
    upstream.handler = sends(ROLE, YES, chunk({}, reason))
    for text in await asked_twice(front, question(stream=True), kept=False):
        assert as_sent(text) == b"".join((ROLE, YES, chunk({}, reason), DONE))


@pytest.mark.parametrize(
    "pieces",
    [
        [ROLE, YES],
        [],
        [ROLE, b'data: {"type":"ping"}\n\n'],
        [b": ping\n\n"],
        [ROLE, END[:30]],
        [ROLE, END, chunk({"content": "x"}).replace(b'"index":0', b'"index":1')],
    ],
)
async def test_a_stream_that_was_cut_is_seen_as_cut(
    front: Front, upstream: Upstream, pieces: list[bytes]
) -> None:
    upstream.handler = sends(*pieces)
    for _ in range(2):
        status, _, text = await front.ask_alone(question(stream=True))
        assert status == 200
        *passed, error = [part for part in text.split(b"\n\n") if part]
        assert len(passed) == sum(piece.endswith(b"\n\n") for piece in pieces)
        assert orjson.loads(error.removeprefix(b"data: "))["error"]["code"] == 502


async def test_an_error_follows_what_came_before_it(front: Front, upstream: Upstream) -> None:
    error = b'data: {"error":{"message":"no memory","code":500}}\n\n'
    upstream.handler = sends(ROLE, END, error, DONE)
    for text in await asked_twice(front, question(stream=True), kept=False):
        assert as_sent(text) == ROLE + END + error


@pytest.mark.parametrize("sent", [b'{"hello":1}', b"[]", b'{"choices":[', b"", b'{"choices":3}'])
async def test_a_body_that_is_not_understood(front: Front, upstream: Upstream, sent: bytes) -> None:
    async def odd(_: web.Request) -> web.StreamResponse:
        return web.Response(body=sent, content_type="application/json")

    upstream.handler = odd
    assert await asked_twice(front, question(), kept=False) == [sent, sent]


async def zipped(http: web.Request) -> web.StreamResponse:
    asked = orjson.loads(await http.read())
    sent = b"".join(WHOLE) if asked.get("stream") else orjson.dumps(body())
    kind = "text/event-stream" if asked.get("stream") else "application/json"
    headers = {"Content-Encoding": "gzip", "Content-Type": kind}
    return web.Response(body=gzip.compress(sent), headers=headers)


@pytest.mark.parametrize("stream_it", [False, True])
async def test_a_coding_that_nobody_asked_for_is_passed_on(
    front: Front, upstream: Upstream, stream_it: bool
) -> None:
    upstream.handler = zipped
    expected = b"".join(WHOLE) if stream_it else orjson.dumps(body())
    for _ in range(2):
        async with front.post(question(stream=stream_it)) as response:
            assert response.headers["Content-Encoding"] == "gzip"
            assert await response.read() == expected
            assert response.headers["Cache-Status"] == "tierserve; fwd=miss"


@pytest.mark.parametrize("odd", [b"event: ping\ndata: pong\n\n", b'data: {"type":[]}\n\n'])
async def test_a_typed_stream_with_odd_events(front: Front, upstream: Upstream, odd: bytes) -> None:
    last = b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n'
    upstream.handler = sends(odd, last, DONE, odd)
    asked = question(stream=True, input="x")
    for _ in range(2):
        async with front.session.post("/v1/responses", json=asked) as response:
            assert response.headers["Cache-Status"] == "tierserve; fwd=miss"
            assert await response.read() == odd + last + DONE + odd


async def test_an_engine_that_we_do_not_know_is_sent_what_came(
    front: Front, upstream: Upstream
) -> None:
    async def strict(http: web.Request) -> web.StreamResponse:
        asked = orjson.loads(await http.read())
        if extra := asked.keys() - {"model", "messages", "temperature", "stream"}:
            return web.json_response({"error": {"message": f"no {sorted(extra)}"}}, status=422)
        return await (stream(http, ROLE, YES, END, DONE) if "stream" in asked else answer(http))

    upstream.handler = strict
    for more in ({}, {"stream": True}):
        # None is made of the other.
        asked = {"model": "n", "messages": [], "temperature": 0} | more
        await asked_twice(front, asked, kept=True)
    status, _, text = await front.ask(question(model="n", **WITH_USAGE))
    assert (status, b"no ['stream_options']" in text) == (422, True)


@pytest_asyncio.fixture(loop_scope="module")
async def go() -> AsyncIterator[asyncio.Event]:
    made = asyncio.Event()
    yield made
    made.set()


CALLS = [
    {"index": 0, "id": f"call_{name}", "type": "function",
     "function": {"name": "weather", "arguments": "{}"}}
    for name in "ab"
]  # fmt: skip


@pytest.mark.parametrize(
    "pieces",
    [
        [b'data: {"type":"ping"}\n\n', *WHOLE[1:]],
        [*(chunk({"tool_calls": [call]}) for call in CALLS), *WHOLE[2:]],
        [chunk({"reasoning_details": [{"text": "since"}]}), *WHOLE[1:]],
        [YES, END, DONE],
    ],
)
async def test_who_asks_in_the_other_form_gets_the_engines_answer(
    front: Front, upstream: Upstream, go: asyncio.Event, pieces: list[bytes]
) -> None:
    async def either(http: web.Request) -> web.StreamResponse:
        if orjson.loads(await http.read()).get("stream"):
            return await stream(http, ROLE, go, *pieces)
        return web.json_response(body("no"))

    upstream.handler = either
    asked = question()
    async with front.post(asked | {"stream": True}) as first:
        await first.content.readuntil(b"\n\n")
        second = asyncio.create_task(front.ask(asked))
        await until_heard(front)
        go.set()
        assert (await first.read()).endswith(DONE)
        status, cache_status, text = await second
    assert (status, cache_status) == (200, "tierserve; fwd=bypass")
    assert orjson.loads(text)["choices"] == body("no")["choices"]
    # Afterwards, too, whether or not the stream was kept.
    status, _, text = await front.ask(asked)
    assert (status, orjson.loads(text)["choices"]) == (200, body("no")["choices"])
    async with front.session.get("/metrics") as response:
        counted = re.findall(r"tierserve_output_tokens_total{.*pass.*} (.*)", await response.text())
    # What was found was given to nobody.
    assert set(counted) <= {"0.0"}


@pytest.mark.parametrize("first_stream", [False, True])
async def test_a_reply_of_another_kind_is_for_who_asked_for_that_form(
    front: Front, upstream: Upstream, go: asyncio.Event, first_stream: bool
) -> None:
    async def page(http: web.Request) -> web.StreamResponse:
        stream = str(orjson.loads(await http.read()).get("stream"))
        if stream == str(first_stream):
            await go.wait()
        return web.Response(text=stream, content_type="text/html")

    upstream.handler = page
    asked = question()
    waiting = [asyncio.create_task(front.ask(asked | {"stream": first_stream}))]
    async with asyncio.timeout(HANGS_S):
        while not upstream.asked:
            await front.ready()
    waiting.append(asyncio.create_task(front.ask(asked | {"stream": not first_stream})))
    await until_heard(front)
    go.set()
    (*_, first), (*_, bypassed, second) = await asyncio.gather(*waiting)
    assert (first, second) == (str(first_stream).encode(), str(not first_stream).encode())
    assert bypassed == "tierserve; fwd=bypass"


async def until_heard(front: Front) -> None:
    """Wait until what was asked before has been read: each answer is a turn of its event loop."""
    for _ in range(20):
        await front.ready()


async def test_a_miss_tells_what_came_from_disk_and_a_hit_does_not(
    front: Front, upstream: Upstream
) -> None:
    async def loaded(_: web.Request) -> web.StreamResponse:
        return web.json_response(body() | {"kv_transfer_params": {"prefix_disk_tokens": 1920}})

    upstream.handler, asked = loaded, question()
    _, status, text = await front.ask_alone(asked)
    assert status == 'tierserve; fwd=miss; detail="1920 prompt tokens from disk"'
    assert orjson.loads(text)["kv_transfer_params"] is None
    _, status, text = await front.ask_alone(asked)
    assert "from disk" not in status
    assert "hit" in status
    assert orjson.loads(text)["kv_transfer_params"] is None


async def test_transfers_of_another_connector_stay_as_they_are(
    front: Front, upstream: Upstream
) -> None:
    async def loaded(_: web.Request) -> web.StreamResponse:
        return web.json_response(body() | {"kv_transfer_params": {"remote_host": "a"}})

    upstream.handler = loaded
    _, status, text = await front.ask_alone(question())
    assert status == "tierserve; fwd=miss"
    assert orjson.loads(text)["kv_transfer_params"] == {"remote_host": "a"}
