"""The front at its edge, HTTP, with an upstream that does what engines rarely do."""

import asyncio
import gzip
import re
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web
from multidict import CIMultiDict

from server.config.load import load
from server.protocol import template
from server.protocol.formats import Encoding
from tests.server.conftest import (
    CHAT,
    ROLE,
    WHOLE,
    Front,
    Upstream,
    alike,
    answer,
    body,
    chunk,
    held,
    question,
    running,
    skip_unless_runs,
    stream,
)
from tiers import Answer, Chain, DiskCache, FrequencySketch, Freshness, Tier

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMELESS = ("unshare", "--user", "--map-user=12345", "--map-group=12345")


async def test_a_hit_is_the_miss_with_an_id_of_its_own(front: Front, upstream: Upstream) -> None:
    asked = question()
    answers = []
    for status in ("tierserve; fwd=miss", r"tierserve; hit; ttl=\d+; detail=memory"):
        async with front.post(asked) as response:
            assert re.fullmatch(status, response.headers["Cache-Status"])
            assert response.headers["Age"] == "0"
            assert response.headers["Server"] == "tierserve"
            answers.append(await response.json())
            assert answers[-1].pop("id") == "chatcmpl-" + response.headers["X-Request-Id"]
            assert answers[-1].pop("created") > 1_700_000_000
    expected = body()
    del expected["id"], expected["created"]
    assert answers == [expected, expected]
    assert len(upstream.asked) == 1


async def test_a_stream_is_passed_on_and_replayed_event_by_event(
    front: Front, upstream: Upstream
) -> None:
    asked = question(stream=True)
    texts = [(await front.ask(asked))[2] for _ in range(2)]
    with_usage = (await front.ask(asked | {"stream_options": {"include_usage": True}}))[2]
    plain, counts = (b"".join(WHOLE[:3]) + WHOLE[4]), b"".join(WHOLE)
    for text, expected in zip((*texts, with_usage), (plain, plain, counts), strict=True):
        ids = set(re.findall(rb'"id":"(.+?)","object":"chat.completion.chunk","created":\d+', text))
        assert len(ids) == 1
        fresh = rb'"id":"[^"]+","object":"chat.completion.chunk","created":\d+'
        same = b'"id":"chatcmpl-x","object":"chat.completion.chunk","created":1'
        assert re.sub(fresh, same, text) == expected
    assert len(upstream.asked) == 1


async def test_a_client_that_waits_to_be_told_is_told_to_send_its_body(front: Front) -> None:
    for asked in (question(), question(temperature=1)):
        status, _, text = await asyncio.wait_for(front.ask(asked, expect100=True), 60)
        assert status == 200
        assert orjson.loads(text)["object"] == "chat.completion"


@pytest.mark.parametrize("stream_it", [False, True])
@pytest.mark.parametrize("reason", [None, "abort", "error"])
async def test_an_unfinished_answer_is_given_and_not_stored(
    front: Front, upstream: Upstream, reason: str | None, stream_it: bool
) -> None:
    async def unfinished(http: web.Request) -> web.StreamResponse:
        if stream_it:
            return await stream(http, ROLE, chunk({"content": "y"}, reason), WHOLE[-1])
        return web.json_response(body("y", reason))

    upstream.handler = unfinished
    asked = question(stream=stream_it)
    for _ in range(2):
        status, cache_status, text = await front.ask(asked)
        assert (status, cache_status) == (200, "tierserve; fwd=miss")
        assert b'"content":"y"' in text
    assert len(upstream.asked) == 2


CUT = b"The engine ended before its answer was complete."


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([ROLE, chunk({"content": "y"})], CUT),
        ([ROLE, b'data: {"error":{"message":"no memory","code":500}}\n\n'], b"no memory"),
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error_and_is_not_stored(
    front: Front, upstream: Upstream, pieces: list[bytes], message: bytes
) -> None:
    async def breaking(http: web.Request) -> web.StreamResponse:
        response = await stream(http, *pieces)
        if http.transport is not None and len(pieces) == 2:
            http.transport.close()
        return response

    upstream.handler = breaking
    asked = question(stream=True)
    for _ in range(2):
        status, cache_status, text = await front.ask(asked)
        assert (status, cache_status) == (200, "tierserve; fwd=miss")
        *_, last, empty = text.split(b"\n\n")
        assert empty == b""
        assert message in orjson.loads(last.removeprefix(b"data: "))["error"]["message"].encode()
    assert len(upstream.asked) == 2


async def test_an_engine_that_breaks_before_it_answers_is_a_502(
    front: Front, upstream: Upstream
) -> None:
    async def gone(http: web.Request) -> web.StreamResponse:
        assert http.transport is not None
        http.transport.close()
        return web.Response()

    upstream.handler = gone
    status, cache_status, text = await front.ask(question())
    assert (status, cache_status) == (502, "tierserve; fwd=miss")
    assert orjson.loads(text)["error"]["type"] == "BadGatewayError"


async def test_an_engines_error_is_passed_on_whole(front: Front, upstream: Upstream) -> None:
    async def busy(_: web.Request) -> web.StreamResponse:
        error = {"error": {"message": "slow down", "code": 429}}
        return web.json_response(error, status=429, headers={"Retry-After": "7"})

    upstream.handler = busy
    asked = question()
    for _ in range(2):
        async with front.post(asked) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "7")
            assert response.headers["Cache-Status"] == "tierserve; fwd=miss"
            assert (await response.json())["error"]["message"] == "slow down"
    assert len(upstream.asked) == 2


async def test_what_is_no_answer_is_passed_on_and_not_stored(
    front: Front, upstream: Upstream
) -> None:
    async def odd(_: web.Request) -> web.StreamResponse:
        return web.Response(text="<p>not JSON", content_type="text/html")

    upstream.handler = odd
    asked = question()
    for _ in range(2):
        assert await front.ask(asked) == (200, "tierserve; fwd=miss", b"<p>not JSON")
    assert len(upstream.asked) == 2


async def test_a_listener_that_leaves_does_not_end_the_others(
    front: Front, upstream: Upstream
) -> None:
    go = asyncio.Event()

    upstream.handler = held(go)
    asked = question(stream=True)
    async with front.post(asked) as first, front.post(asked) as second:
        assert await first.content.readuntil(b"\n\n")
        assert second.headers["Cache-Status"] == "tierserve; fwd=miss; collapsed"
        first.close()
        go.set()
        assert (await second.read()).endswith(b"data: [DONE]\n\n")
    assert not upstream.aborted.is_set()
    assert "hit" in (await front.ask(asked))[1]
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
async def test_hanging_up_ends_the_engines_work(
    front: Front, upstream: Upstream, path: str
) -> None:
    never = asyncio.Event()
    before = await front.metric('tierserve_requests_total{model="m",outcome="aborted"')

    async def endless(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE, never)

    upstream.handler = endless
    async with front.session.post(path, json=question(stream=True)) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await asyncio.wait_for(upstream.aborted.wait(), 60)
    assert await front.metric('tierserve_requests_total{model="m",outcome="aborted"') == before + 1


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
async def test_a_stream_begins_when_the_engines_does(
    front: Front, upstream: Upstream, path: str
) -> None:
    go = asyncio.Event()

    async def slow(http: web.Request) -> web.StreamResponse:
        return await stream(http, go, *WHOLE)

    upstream.handler = slow
    async with front.session.post(path, json=question(stream=True)) as response:
        assert response.headers["X-Accel-Buffering"] == "no"
        go.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_stream_waits_for_its_first_event_where_a_stale_answer_may_stand_in(
    front: Front, upstream: Upstream
) -> None:
    async def fails(http: web.Request) -> web.StreamResponse:
        return await stream(http, b'data: {"error":{"message":"no memory","code":500}}\n\n')

    asked = question(model="sie", stream=True)
    await front.ask(asked)
    upstream.handler = fails
    status, cache_status, text = await front.ask_alone(asked)
    assert (status, b"yes" in text) == (200, True)
    assert "fwd=stale; fwd-status=500" in cache_status
    _, cache_status, text = await front.ask(asked, headers={"Cache-Control": "max-age=0"})
    assert (cache_status, b"no memory" in text) == ("tierserve; fwd=stale", True)


async def test_other_routes_pass_without_buffering(front: Front, upstream: Upstream) -> None:
    go = asyncio.Event()

    async def two_pieces(http: web.Request) -> web.StreamResponse:
        assert http.raw_path == "/some/route?a=%20b"
        assert http.headers["X-Mine"] == "1"
        return await stream(http, b"one", go, b"two")

    upstream.handler = two_pieces
    async with front.session.put(
        aiohttp.client.URL("/some/route?a=%20b", encoded=True), data=b"x", headers={"X-Mine": "1"}
    ) as response:
        assert await response.content.readexactly(3) == b"one"
        go.set()
        assert await response.read() == b"two"


async def test_a_cut_pass_through_is_seen_as_cut(front: Front, upstream: Upstream) -> None:
    async def cut(http: web.Request) -> web.StreamResponse:
        response = await stream(http, b"some")
        assert http.transport is not None
        http.transport.close()
        return response

    upstream.handler = cut
    with pytest.raises(aiohttp.ClientPayloadError):
        async with front.session.get("/elsewhere") as response:
            await response.read()


# Its head would hold the time, by which workers would collect tests of other names.
GZIPPED = gzip.compress(b"{}" * 500, mtime=0)


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", b"no gzip"),
        ("x-gzip", GZIPPED[:-1]),
        ("gzip", GZIPPED[:-20]),
        ("gzip", GZIPPED + b"more"),
        ("deflate", zlib.compress(b"{}")[:-1]),
    ],
)
async def test_a_body_that_is_not_what_it_says_is_a_clients_mistake(
    front: Front, upstream: Upstream, path: str, coding: str, data: bytes
) -> None:
    whole: list[bytes] = []

    async def read(http: web.Request) -> web.StreamResponse:
        whole.append(await http.read())
        return web.Response()

    upstream.handler = read
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    async with front.session.post(path, data=data, headers=headers) as response:
        assert response.status == 400
        message = (await response.json())["error"]["message"]
        assert message == f"The body should be whole and in {coding}, as its Content-Encoding says."
    assert whole == []


async def test_a_redirect_does_not_lead_past_us(front: Front, upstream: Upstream) -> None:
    async def redirect(_: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"{upstream.url}/there?a=%20b"})

    upstream.handler = redirect
    async with front.session.get("/here", allow_redirects=False) as response:
        assert response.headers["Location"] == "/there?a=%20b"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"Cache-Control": "no-store"}, ["tierserve; fwd=bypass"] * 2),
        ({"Content-Type": "text/plain"}, ["tierserve; fwd=bypass"] * 2),
        ({"Cache-Control": "max-age=0, No-Cache"}, ["tierserve; fwd=request"] * 2),
    ],
)
async def test_what_a_client_may_ask_of_the_tiers(
    front: Front, upstream: Upstream, sent: dict, expected: list[str]
) -> None:
    asked = question()
    headers = {"Content-Type": "application/json"} | sent
    data = orjson.dumps(asked)
    statuses = []
    async with asyncio.timeout(60):
        while len(statuses) < 2:
            async with front.session.post(CHAT, data=data, headers=headers) as response:
                assert response.status == 200
                statuses += [s for s in [response.headers["Cache-Status"]] if "collapsed" not in s]
    assert statuses == expected
    stored = "no-store" not in sent.values() and "text/plain" not in sent.values()
    assert ("hit" in (await front.ask(asked))[1]) is stored


async def test_a_query_is_the_engines_to_understand(front: Front, upstream: Upstream) -> None:
    for _ in range(2):
        path = f"{CHAT}?api-version=3"
        async with front.session.post(path, json=question(model="n")) as response:
            assert response.headers["Cache-Status"] == "tierserve; fwd=bypass"
    assert upstream.asked[0].query_string == "api-version=3"


async def test_a_query_is_nothing_to_a_vllm(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask_alone(asked)
    async with front.session.post(f"{CHAT}?beta=true&model=n", json=asked) as response:
        assert "hit" in response.headers["Cache-Status"]


async def test_absolute_targets_and_hop_by_hop_headers(front: Front, upstream: Upstream) -> None:
    async def fine(_: web.Request) -> web.StreamResponse:
        return web.Response()

    upstream.handler = fine
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(
        b"POST http://a.example/x//%7Ey?q HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n"
        b"Connection: X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n"
        b"Connection: X-Other, Anthropic-Beta\r\nX-Other: 3\r\nAnthropic-Beta: b\r\n\r\n1"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    (asked,) = upstream.asked
    assert asked.raw_path == "/x//%7Ey?q"
    assert not {"X-Hop", "X-Other"} & {*asked.headers}
    # The last is part of keys.
    assert (asked.headers["X-End"], asked.headers["Anthropic-Beta"]) == ("2", "b")
    # Nor do any come that the client has not sent.
    added = {"Accept", "Content-Type", "User-Agent"}
    assert added.isdisjoint(asked.headers)


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/files", "/v1/models"])
async def test_who_names_two_keys_is_refused(front: Front, upstream, path: str, name: str) -> None:
    method = "GET" if path == "/v1/models" else "POST"
    for values in (("Bearer a", "Bearer b"), ("Bearer a", "Bearer a")):
        headers = CIMultiDict((name, value) for value in values)
        async with front.session.request(method, path, json=question(), headers=headers) as reply:
            refused = await reply.json()
            assert reply.status == 400
        text = f"The header {name} should stand once, and stands 2 times."
        if path == "/v1/messages":
            assert refused["error"] == {"type": "invalid_request_error", "message": text}
        else:
            kind = "BadRequestError"
            assert refused["error"] == {"message": text, "type": kind, "param": name, "code": 400}
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await front.session.ws_connect("/v1/realtime", headers=headers)
    assert caught.value.status == 400
    assert upstream.asked == []


@pytest.mark.parametrize("name", ["anthropic-beta", "openai-organization"])
async def test_what_is_said_twice_is_another_request(front: Front, upstream, name: str) -> None:
    asked = question(model="n")
    for values in (["a", "b"], ["a"], ["b"], ["a, b"], ["b", "a"]):
        headers = CIMultiDict((name, each) for each in values)
        assert (await front.ask(asked, headers=headers))[1] == "tierserve; fwd=miss"
        assert upstream.asked[-1].headers.getall(name) == values


async def test_headers_that_are_no_text_are_no_failure(front: Front, upstream: Upstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    raw = orjson.dumps(question())
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw)
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_connections_stay_or_close_as_asked(
    front: Front, upstream: Upstream, version: bytes
) -> None:
    raw = orjson.dumps(question())
    for wish in (b"keep-alive", b"close"):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        asked = (
            b"POST /v1/chat/completions HTTP/%s\r\nHost: a\r\nConnection: %s\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (version, wish, len(raw), raw)
        )
        for _ in range(2 if wish == b"keep-alive" else 1):
            writer.write(asked)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            assert (b"Connection: close" in head) is (wish == b"close")
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])
            await reader.readexactly(length)
        if wish == b"close":
            assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_websockets_pass_through(front: Front, upstream: Upstream) -> None:
    async def echo(http: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=["realtime"])
        await socket.prepare(http)
        async for message in socket:
            if message.data == "bye":
                await socket.close(code=4001)
            elif isinstance(message.data, bytes):
                await socket.send_bytes(message.data)
            else:
                await socket.send_str(message.data)
        return socket

    upstream.handler = echo
    session = front.session
    async with session.ws_connect("/v1/realtime?a=1", protocols=["x", "realtime"]) as socket:
        assert socket.protocol == "realtime"
        await socket.send_str("hi")
        assert await socket.receive_str() == "hi"
        await socket.send_bytes(b"\x00")
        assert await socket.receive_bytes() == b"\x00"
        await socket.send_str("bye")
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 4001
    assert upstream.asked[0].raw_path == "/v1/realtime?a=1"


async def test_a_websocket_that_is_refused_or_left(front: Front, upstream: Upstream) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=403)

    async def listen(http: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        async for _ in socket:
            pass
        upstream.aborted.set()
        return socket

    upstream.handler = refuse
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await front.session.ws_connect("/v1/realtime")
    assert caught.value.status == 403
    upstream.handler = listen
    async with front.session.ws_connect("/v1/realtime"):
        pass
    await asyncio.wait_for(upstream.aborted.wait(), 60)


def in_two_members(data: bytes) -> bytes:
    return gzip.compress(data[:9]) + gzip.compress(data[9:])


def raw_deflated(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("X-GZip", gzip.compress),
        ("gzip", in_two_members),
        ("identity, deflate", zlib.compress),
        ("deflate", raw_deflated),
        ("identity", bytes),
    ],
)
async def test_compressed_requests_are_understood(
    front: Front, upstream: Upstream, coding: str, pack: Callable[[bytes], bytes]
) -> None:
    asked = question(user=" " * 65_536)
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    for path in (CHAT, "/v1/others"):
        packed = pack(orjson.dumps(asked))
        async with front.session.post(path, data=packed, headers=headers) as response:
            assert response.status == 200
    assert "hit" in (await front.ask(asked))[1]
    assert upstream.asked[1].headers.get("Content-Encoding", "identity") == "identity"


@pytest.mark.parametrize("coding", ["gzip, gzip", "br", "unknown"])
async def test_other_codings_are_refused_or_passed_on(
    front: Front, upstream: Upstream, coding: str
) -> None:
    read: list[bytes] = []

    async def fine(http: web.Request) -> web.StreamResponse:
        read.append(await http.content.read())
        return web.Response()

    upstream.handler = fine
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    async with front.session.post(CHAT, data=b"coded", headers=headers) as response:
        assert (response.status, response.headers["Accept-Encoding"]) == (415, "gzip, deflate")
        assert coding in (await response.json())["error"]["message"]
    # Of several models nobody has to be found by what it says.
    headers = {"Content-Encoding": "unknown"}
    async with front.session.post("/v1/others", data=b"coded", headers=headers) as response:
        assert response.status == 200
    assert (read, upstream.asked[0].headers["Content-Encoding"]) == ([b"coded"], "unknown")


async def test_what_unpacks_to_more_than_a_body_may_have_is_refused(
    front: Front, upstream: Upstream
) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    packed = gzip.compress(bytes(10_000_000))
    async with front.session.post(CHAT, data=packed, headers=headers) as response:
        assert response.status == 413


@pytest.mark.parametrize("length", [True, False])
async def test_an_upload_goes_on_with_its_length(
    front: Front, upstream: Upstream, length: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"12"
        yield b"345"

    async def read(http: web.Request) -> web.StreamResponse:
        return web.Response(body=await http.read())

    upstream.handler = read
    headers = {"Content-Length": "5"} if length else {}
    async with front.session.post("/v1/files", data=pieces(), headers=headers) as response:
        assert await response.read() == b"12345"
    headers = upstream.asked[0].headers
    assert ("Content-Length" in headers, "Transfer-Encoding" in headers) == (length, not length)


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id.7", True), ("", False), ("a b", False), ("x" * 129, False)]
)
async def test_request_ids_are_returned_and_passed_on(
    front: Front, upstream: Upstream, given: str, kept: bool
) -> None:
    async with front.post(question(), headers={"X-Request-Id": given}) as response:
        id_ = response.headers["X-Request-Id"]
    assert (id_ == given) is kept
    assert upstream.asked[0].headers["X-Request-Id"] == id_


@pytest.mark.parametrize("path", [CHAT, f"{CHAT}/batch", f"{CHAT}/render", "/v1/messages/render"])
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_request_may_be_named_in_its_body(
    front: Front, upstream: Upstream, path: str, temperature: int
) -> None:
    asked = question(model="m", temperature=temperature)
    for given_id, header in (("mine", None), ("other", "its.own"), ("an odd one", None)):
        headers = {"X-Request-Id": header} if header else {}
        body = asked | {"request_id": given_id}
        async with front.session.post(path, json=body, headers=headers) as response:
            id_ = response.headers["X-Request-Id"]
            told_id = (await response.json())["id"]
        assert id_ == (header or (given_id if given_id == "mine" else id_))
        if path == CHAT and temperature == 0:
            # Misses and hits.
            assert told_id == f"chatcmpl-{id_}"
        else:
            # What isn't taken is the engine's to hear.
            heard = None if given_id == "an odd one" else id_
            assert upstream.asked[-1].headers.get("X-Request-Id") == heard


async def test_what_a_body_may_say_that_nobody_reads_is_the_engines(upstream, tmp_path) -> None:
    async with Front(tmp_path, {"m": {"upstreams": [upstream.url]}}) as front:
        for path, options in (("/v1/render", {"json": {}}), ("/v1/load", {"data": None})):
            async with front.session.post(path, **options) as response:
                assert response.headers["X-Request-Id"]
    named = ["X-Request-Id" in asked.headers for asked in upstream.asked]
    assert named == [False, True]


async def test_answers_are_not_shared_between_credentials(front: Front, upstream: Upstream) -> None:
    asked = question()
    for credential in ("Bearer a", "Bearer b"):
        headers = {"Authorization": credential}
        assert (await front.ask(asked, headers=headers))[1] == "tierserve; fwd=miss"
        assert "hit" in (await front.ask(asked, headers=headers))[1]
    assert [http.headers["Authorization"] for http in upstream.asked] == ["Bearer a", "Bearer b"]


async def test_chance_is_passed_by(front: Front, upstream: Upstream) -> None:
    asked = question(temperature=0.5)
    for _ in range(2):
        assert (await front.ask(asked))[1] == "tierserve; fwd=bypass"
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{]", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 20_000 + b"\r\n\r\n", 431),
    ],
)
async def test_bad_requests_get_errors_in_openais_shape(
    front: Front, upstream: Upstream, sent: bytes, status: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(sent + (b"x" * 999_999 if status == 413 else b""))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    error = orjson.loads(await reader.readexactly(length))["error"]
    writer.close()
    assert re.match(rb"HTTP/1.[01] %d " % status, head)
    assert error["code"] == status
    assert error["param"] == ("body" if "JSON" in error["message"] else None)
    assert error["type"].endswith("Error")
    assert b"Server: tierserve" in head
    assert upstream.asked == []


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"nonsense\r\n\r\n", ": its method is invalid, or it is TLS on a port without."),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
         ": its method is invalid, or it is TLS on a port without."),
        (b"GET / HTTP/9.9\r\n\r\n", ": its first line should end with HTTP/1.1 or HTTP/1.0."),
        (b"GET http://[s3cr3t/ HTTP/1.1\r\nHost: a\r\n\r\n", ": its target is no URL."),
        (b"GET / HTTP/1.1\r\nHost: a\r\ns3cr3t b: c\r\n\r\n", "."),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "."),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "."),
    ],
)  # fmt: skip
async def test_what_is_no_http_is_told_why(front: Front, sent: bytes, why: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(sent)
    reply = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    error = orjson.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"] == f"The request is not valid HTTP{why}"


async def test_a_dead_upstream_costs_hits_nothing(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask(asked)
    await upstream.stop()
    await front.until_ready(503)
    assert "hit" in (await front.ask(asked))[1]
    async with front.post(question()) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        assert (await response.json())["error"]["type"] == "ServiceUnavailableError"
    assert await front.metric('tierserve_engine_state{model="m",state="down"') == 1
    await upstream.start()
    await front.until_ready()
    assert (await front.ask(question()))[0] == 200


async def test_a_stale_answer_is_given_while_a_new_one_is_made(
    front: Front, upstream: Upstream
) -> None:
    async def newer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body("newer"))

    asked = question(model="swr")
    await front.ask(asked)
    upstream.handler = newer
    texts = []
    async with asyncio.timeout(60):
        while not texts or b"newer" not in texts[-1]:
            _, cache_status, text = await front.ask(asked)
            assert re.fullmatch(r"tierserve; hit; ttl=-\d+; detail=memory", cache_status)
            texts.append(text)
    assert b"yes" in texts[0]
    assert len(upstream.asked) >= 2


async def test_a_client_says_how_old_an_answer_may_be(front: Front, upstream: Upstream) -> None:
    hit = r"tierserve; hit; ttl=-?\d+; detail=memory"

    async def status_of(asked: dict, control: str) -> tuple[int, str]:
        status, cache_status, _ = await front.ask_alone(asked, headers={"Cache-Control": control})
        return status, cache_status

    asked = question()
    for control, status, cache_status in (
        ("only-if-cached", 504, "tierserve; detail=only-if-cached"),
        ("max-age=0", 200, "tierserve; fwd=miss"),
        ("only-if-cached", 200, hit),
        ("max-age=3600", 200, hit),
        ("min-fresh=60", 200, hit),
        ("max-age=0, only-if-cached", 504, "tierserve; detail=only-if-cached"),
        ("min-fresh=99999999", 200, "tierserve; fwd=request"),
        ("no-cache", 200, "tierserve; fwd=request"),
    ):
        found = await status_of(asked, control)
        assert found[0] == status, control
        assert re.fullmatch(cache_status, found[1]), control
    # Not counted: what the test before had refreshed in the background.
    content = orjson.dumps(asked["messages"])
    assert [content in await http.read() for http in upstream.asked].count(True) == 3
    chance = question(temperature=1)
    assert (await status_of(chance, "only-if-cached"))[0] == 504
    stale = question(model="sie")
    await front.ask(stale)
    assert re.fullmatch(hit, (await status_of(stale, "max-stale"))[1])
    assert re.fullmatch(hit, (await status_of(stale, "max-stale=60, only-if-cached"))[1])
    assert (await status_of(stale, "only-if-cached"))[0] == 504
    await upstream.stop()
    await front.until_ready(503)
    assert (await status_of(stale, "max-age=0"))[0] == 503
    await upstream.start()
    await front.until_ready()


async def test_a_stale_answer_stands_in_for_an_engine_that_fails(
    front: Front, upstream: Upstream
) -> None:
    async def fails(http: web.Request) -> web.StreamResponse:
        status = 400 if http.headers.get("User-Agent") == "1" else 500
        return web.json_response({"error": {"message": "no", "code": status}}, status=status)

    asked = question(model="sie")
    await front.ask(asked)
    upstream.handler = fails
    for stream_it in (False, True):
        status, cache_status, text = await front.ask_alone(asked | {"stream": stream_it})
        assert (status, b"yes" in text) == (200, True)
        expected = r"tierserve; fwd=stale; fwd-status=500; ttl=-\d+; detail=memory"
        assert re.fullmatch(expected, cache_status)
    assert (await front.ask(asked, headers={"User-Agent": "1"}))[0] == 400
    await upstream.stop()
    await front.until_ready(503)
    assert re.fullmatch(
        r"tierserve; fwd=stale; ttl=-\d+; detail=memory", (await front.ask(asked))[1]
    )
    await upstream.start()
    await front.until_ready()
    upstream.handler = answer
    assert (await front.ask(asked))[1] == "tierserve; fwd=stale"


async def test_who_takes_no_new_connection_is_not_ready(own_upstream: Upstream, tmp_path) -> None:
    async with running(tmp_path, own_upstream) as front:
        assert (await front.ask(question()))[0] == 200
        for site in list(own_upstream._runner.sites):
            await site.stop()
        await front.until_ready(503)
    assert f"{own_upstream.url} is not ready" in front.log.read_text()


async def test_upstreams_take_turns_and_stand_in_for_each_other(tmp_path) -> None:
    async with Upstream() as one, Upstream() as other, running(tmp_path, one, other) as front:
        async with asyncio.timeout(60):
            while not (one.asked and other.asked):
                assert (await front.ask(question()))[0] == 200
        await one.stop()
        statuses = {(await front.ask(question()))[0] for _ in range(4)}
        assert statuses == {200}


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
async def test_a_stop_lets_running_answers_end(upstream: Upstream, tmp_path, path: str) -> None:
    go = asyncio.Event()

    asked = question(stream=True)
    upstream.handler = held(go)
    async with running(tmp_path, upstream) as front:
        async with front.session.post(path, json=asked) as response:
            await response.content.readuntil(b"\n\n")
            front.process.terminate()
            await front.until_ready(0)
            go.set()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(front.process.wait(), 60) == 0
        if path == CHAT:
            await front.session.close()
            await front.start()
            assert "tierserve; hit" in (await front.ask(asked))[1]


async def test_a_second_signal_ends_at_once(upstream: Upstream, tmp_path) -> None:
    never = asyncio.Event()

    async def endless(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE, never)

    upstream.handler = endless
    async with (
        running(tmp_path, upstream) as front,
        front.post(question(stream=True)) as response,
    ):
        await response.content.readuntil(b"\n\n")
        async with asyncio.timeout(60):
            # A first one may still come several times.
            while front.process.returncode is None:
                front.process.terminate()
                await asyncio.sleep(0.2)
        assert front.process.returncode == 130


async def test_a_taken_port_is_said(front: Front, upstream: Upstream) -> None:
    process = await asyncio.create_subprocess_exec(*front.command, stderr=asyncio.subprocess.PIPE)
    _, log = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"address already in use" in log


async def plant(front: Front, asked: dict, stored_at: float, ttl_s: float) -> None:
    """Store an answer on disk, as if it had been stored then."""
    disk = load(front.config).tiers.disk
    clock = partial(float, stored_at)
    chain = Chain(
        [Tier("disk", DiskCache(disk.path, disk.max_bytes, clock=clock))],
        frequency=FrequencySketch(1),
        max_answer_bytes=10_000,
        clock=clock,
    )
    answer = Answer(Encoding.JSON, template.json_template(body("old")))
    assert await chain.store(front.key(asked), answer, Freshness(ttl_s))
    await chain.close()


async def test_an_age_is_counted_from_when_the_answer_was_stored(
    upstream: Upstream, tmp_path
) -> None:
    asked = question()
    stored_at = time.time() - 1000
    front = Front(tmp_path, alike(upstream.url))
    await plant(front, asked, stored_at, 2000)
    async with front:
        for stream_it in (False, True):
            before = time.time()
            async with front.post(asked | {"stream": stream_it}) as response:
                assert b"old" in await response.read()
                ttl = int(re.search(r"hit; ttl=(\d+);", response.headers["Cache-Status"])[1])
                age = int(response.headers["Age"])
            after = time.time()
            assert int(before - stored_at) <= age <= int(after - stored_at)
            assert int(stored_at + 2000 - after) <= ttl <= int(stored_at + 2000 - before)
    assert upstream.asked == []


async def test_a_user_without_a_home_has_to_be_given_all_paths(upstream: Upstream, tmp_path):
    skip_unless_runs(*NAMELESS)
    front = Front(tmp_path, alike(upstream.url))
    # Nor is there anything else in its environment.
    front.wrapper = ("env", "-i", *NAMELESS)
    async with front:
        assert (await front.ask(question()))[0] == 200
        assert (tmp_path / "disk" / "data.mdb").exists()
    assert front.process.returncode == 0
    front.config.write_text("tracing: null")
    for action in ("check", "serve"):
        command = [action if part == "serve" else part for part in front.command]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2
        for field in ("tiers.disk.path", "admin.socket", "models.smollm2-135m-instruct.source"):
            assert f"{field}: " in ended.stderr
        assert ended.stderr.count("has no home folder") == len(ended.stderr.splitlines()) == 3


async def test_what_was_stored_while_the_clock_was_ahead_is_made_anew(
    upstream: Upstream, tmp_path
) -> None:
    asked = [question(), question()]
    front = Front(tmp_path, alike(upstream.url))
    for each in asked:
        await plant(front, each, time.time() + 3600, 3)
    async with front:
        for each, headers in zip(asked, ({}, {"Cache-Control": "max-age=1"}), strict=True):
            status, how, text = await front.ask(each, headers=headers)
            assert (status, how, b"old" in text) == (200, "tierserve; fwd=miss", False)
        _, how, text = await front.ask_alone(asked[0])
        assert ("hit; ttl=" in how, b"old" in text) == (True, False)


async def test_each_answer_leaves_a_line_with_its_id(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask(asked, headers={"X-Request-Id": "the-miss"})
    await front.ask(asked, headers={"X-Request-Id": "the-hit"})
    async with front.session.get("/a%0Ab%1B%22", headers={"X-Request-Id": "odd"}) as response:
        assert response.headers["X-Request-Id"] == "odd"
    assert upstream.asked[-1].raw_path == "/a%0Ab%1B%22"
    logged = {}
    async with asyncio.timeout(60):
        while not logged.keys() >= {"the-miss", "the-hit", "odd"}:
            await asyncio.sleep(0.05)
            # The last one may be on its way.
            whole = front.log.read_bytes().rpartition(b"\n")[0]
            lines = map(orjson.loads, whole.splitlines())
            logged = {line["request_id"]: line for line in lines if "request_id" in line}
    for id_, tier, outcome in (("the-miss", "engine", "miss"), ("the-hit", "memory", "hit")):
        line = logged[id_]
        assert line["message"] == f"POST {CHAT} 200"
        assert (line["tier"], line["outcome"]) == (tier, outcome)
        assert line["ms"] > 0
    assert logged["odd"]["message"] == 'GET /a\nb\x1b" 500'


async def outcomes(front: Front) -> Counter[tuple[str, str]]:
    """Return how many requests there were, by tier and outcome, without ours."""
    async with front.session.get("/metrics") as response:
        text = await response.text()
    line = r'^tierserve_requests_total\{model=".*",outcome="(.+)",tier="(.+)"\} (.+)$'
    found: Counter[tuple[str, str]] = Counter()
    for outcome, tier, count in re.findall(line, text, re.M):
        if outcome != "own":
            found[tier, outcome] += int(float(count))
    return found


async def until_counted(front: Front, expected: Counter[tuple[str, str]]) -> None:
    """Wait for these: a stream is counted when its end has been sent."""
    found: Counter[tuple[str, str]] = Counter()
    async with asyncio.timeout(60):
        while found.total() < expected.total():
            found = await outcomes(front)
            await asyncio.sleep(0)
    assert found == expected


async def test_requests_are_counted_by_who_answered_and_how(upstream: Upstream, tmp_path) -> None:
    async def refuses(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=500)

    async def breaks(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE)

    counts: Counter[tuple[str, str]] = Counter()

    async def asks(asked: dict, tier: str, outcome: str, **options) -> None:
        while "collapsed" in (await front.ask(asked, **options))[1]:
            # The flight before has not landed yet.
            counts["engine", "collapsed"] += 1
        counts[tier, outcome] += 1
        await until_counted(front, counts)

    async with running(tmp_path, upstream) as front:
        plain, spare, old = question(), question(model="sie"), question(model="swr")
        for asked in (plain, spare, old):
            await asks(asked, "engine", "miss")
        await asks(plain, "memory", "hit")
        await asks(plain | {"stream": True}, "memory", "hit")
        await asks(plain, "engine", "pass", headers={"Cache-Control": "no-store"})
        await asks(question(temperature=1), "engine", "pass")
        await asks(old, "memory", "stale")
        upstream.handler = refuses
        await asks(question(), "engine", "error")
        await asks(spare, "memory", "stale")
        upstream.handler = breaks
        await asks(question(stream=True), "engine", "error")


async def test_followers_and_those_who_leave_are_counted_as_such(
    upstream: Upstream, tmp_path
) -> None:
    go = asyncio.Event()

    upstream.handler = held(go)
    asked = question(stream=True)
    async with running(tmp_path, upstream) as front:
        async with (
            front.post(asked) as first,
            front.post(asked) as second,
            front.post(asked) as third,
        ):
            await third.content.readuntil(b"\n\n")
            third.close()
            await until_counted(front, Counter({("engine", "aborted"): 1}))
            go.set()
            for each in (first, second):
                await each.read()
        counts = dict.fromkeys(("aborted", "miss", "collapsed"), 1)
        await until_counted(front, Counter({("engine", how): n for how, n in counts.items()}))


async def test_slow_clients_are_told_to_go(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__CLIENT_TIMEOUT_S", "0.3")
    half = b"Host: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"

    async def send_half(front: Front, path: str) -> None:
        reply = b""
        async with asyncio.timeout(60):
            # Who is too slow for half of it is told nothing.
            while not reply:
                reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
                writer.write(b"POST " + path.encode() + b" HTTP/1.1\r\n" + half)
                reply = await reader.read()
                writer.close()
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"type":"RequestTimeoutError"' in reply

    async with running(tmp_path, upstream) as front:
        # At once, since each connection is open for ten seconds more.
        await asyncio.gather(send_half(front, CHAT), send_half(front, "/v1/others"))
        for beginning in (b"", b"POST " + CHAT.encode() + b" HT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(beginning)
            assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()
        assert (await front.ask(question()))[0] == 200


async def test_more_than_the_engine_takes_is_sent_away(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERSERVE__MODELS__M__MAX_REQUESTS", "2")
    go = asyncio.Event()
    async with running(tmp_path, upstream) as front:
        known = question()
        await front.ask(known)
        upstream.handler = held(go)
        asked = [question(stream=True), question(stream=True)]
        waiting = [asyncio.create_task(front.ask(each)) for each in asked]
        async with asyncio.timeout(60):
            while len(upstream.asked) < 3:
                await front.ready()
        for more in (question(), question(temperature=1)):
            async with front.post(more) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
                assert "as many requests" in (await response.json())["error"]["message"]
        assert "hit" in (await front.ask(known))[1]
        go.set()
        assert [status for status, *_ in await asyncio.gather(*waiting)] == [200, 200]
        upstream.handler = answer
        assert (await front.ask(question()))[0] == 200


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_stops_reading_gives_its_place_up(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setenv("TIERSERVE__SERVER__CLIENT_TIMEOUT_S", "0.3")
    monkeypatch.setenv("TIERSERVE__MODELS__M__MAX_REQUESTS", "1")
    path = CHAT if is_stream else "/endless"
    more = chunk({"content": "x" * 64 * 1024}) if is_stream else bytes(64 * 1024)

    async def endless(http: web.Request) -> web.StreamResponse:
        if not orjson.loads(await http.read()).get("stream"):
            return await answer(http)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        while True:
            await response.write(more)

    upstream.handler = endless
    async with running(tmp_path, upstream) as front:
        _, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1024)
        writer.write(sent(path, question(stream=True)))
        async with asyncio.timeout(60):
            while not any(each.path == path for each in upstream.asked):
                await front.ready()
            refused = 0
            while (await front.ask(question()))[0] != 200:
                refused += 1
        # It was no fault of the engine.
        await front.until_metric('tierserve_requests_total{model="m",outcome="aborted"', 1)
        assert await front.metric('tierserve_requests_total{model="m",outcome="error"') == refused
        writer.close()
    upstream.handler = answer


async def test_cache_control_may_stand_on_several_lines(front: Front, upstream: Upstream) -> None:
    asked = question()
    headers = CIMultiDict([("Cache-Control", "max-age=60"), ("Cache-Control", "no-store")])
    for _ in range(2):
        assert (await front.ask(asked, headers=headers))[1] == "tierserve; fwd=bypass"


@pytest.mark.parametrize("stream_it", [False, True])
@pytest.mark.parametrize(
    ("control", "then"),
    [
        ("no-store", "tierserve; fwd=miss"),
        ("private", "tierserve; fwd=miss"),
        ("public, max-age=90", r"tierserve; hit; ttl=\d\d; detail=memory"),
    ],
)
async def test_an_upstream_says_how_long_its_answers_are_kept(
    front: Front, upstream: Upstream, control: str, then: str, stream_it: bool
) -> None:
    async def controlled(http: web.Request) -> web.StreamResponse:
        headers = {"Cache-Control": control}
        if stream_it:
            return await stream(http, *WHOLE, headers=headers)
        return web.json_response(body(), headers=headers)

    upstream.handler = controlled
    asked = question(stream=stream_it)
    assert (await front.ask(asked))[1] == "tierserve; fwd=miss"
    assert re.fullmatch(then, (await front.ask_alone(asked))[1])


async def test_what_an_upstream_says_of_caches_may_be_ignored(
    upstream: Upstream, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_store(_: web.Request) -> web.StreamResponse:
        return web.json_response(body(), headers={"Cache-Control": "no-store"})

    monkeypatch.setenv("TIERSERVE__CACHE__OBEY_UPSTREAMS", "false")
    upstream.handler = no_store
    asked = question()
    async with running(tmp_path, upstream) as front:
        await front.ask(asked)
        assert "hit" in (await front.ask_alone(asked))[1]


def sent(path: str, asked: dict | None = None, version: str = "1.1") -> bytes:
    """A request as it is sent: a POST if there is something to ask."""
    raw = b"" if asked is None else orjson.dumps(asked)
    head = f"{'GET' if asked is None else 'POST'} {path} HTTP/{version}\r\nHost: a\r\n"
    more = f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return (head + more).encode() + raw


async def half_closed(
    front: Front, data: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(data)
    writer.write_eof()
    return reader, writer


async def test_who_says_no_more_is_answered(front: Front, upstream: Upstream) -> None:
    asked, streamed, chance = question(), question(stream=True), question(temperature=1)
    for data in (
        sent("/health"),
        sent("/health", version="1.0"),
        sent("/health") + sent("/ready") + sent(CHAT, asked),
        sent(CHAT, asked),
        sent(CHAT, streamed),
        sent(CHAT, chance),
        sent("/v1/others", {"a": 1}),
    ):
        reader, writer = await half_closed(front, data)
        reply = await asyncio.wait_for(reader.read(), 60)
        heads = re.findall(rb"HTTP/1.[01] (\d+) ", reply)
        assert heads == [b"200"] * data.count(b" HTTP/1."), data
        writer.close()
    for data in (b"", b"GET", sent(CHAT, asked)[:-1]):
        reader, writer = await half_closed(front, data)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


@pytest.mark.parametrize("path", [CHAT, "/v1/others"])
@pytest.mark.parametrize("gone", [False, True])
async def test_who_says_no_more_and_waits_is_told_from_who_has_gone(
    front: Front, upstream: Upstream, path: str, gone: bool
) -> None:
    go = asyncio.Event()

    async def slow(http: web.Request) -> web.StreamResponse:
        await go.wait()
        return web.json_response(body())

    upstream.handler = slow
    reader, writer = await half_closed(front, sent(path, question()))
    if gone:
        writer.close()
        await asyncio.wait_for(upstream.aborted.wait(), 60)
        return
    # Two of them, so that the first has been answered by no reset.
    for _ in range(2):
        reply = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert reply == b"HTTP/1.1 100 Continue\r\n\r\n"
    go.set()
    reply = await asyncio.wait_for(reader.read(), 60)
    assert b"HTTP/1.1 200 OK\r\n" in reply
    assert b'"content":"yes"' in reply.replace(b'": "', b'":"')
    assert not upstream.aborted.is_set()
    writer.close()
