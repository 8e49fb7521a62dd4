"""Requests as they arrive: their bodies, codings, ids and headers."""

import asyncio
import gzip
import zlib
from collections.abc import Callable

import aiohttp
import orjson
import pytest
from aiohttp import web
from multidict import CIMultiDict

from tests.server.conftest import (
    CHAT,
    Front,
    Upstream,
    question,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_expect_continue_is_answered(front: Front) -> None:
    for asked in (question(), question(temperature=1)):
        status, _, text = await asyncio.wait_for(front.ask(asked, expect100=True), HANGS_S)
        assert status == 200
        assert orjson.loads(text)["object"] == "chat.completion"


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


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/files", "/v1/models"])
async def test_two_credentials_are_refused(front: Front, upstream, path: str, name: str) -> None:
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


async def test_headers_that_are_no_text_are_no_failure(front: Front, upstream: Upstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    raw = orjson.dumps(question())
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw)
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


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
async def test_a_body_may_hold_the_requests_id(
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


async def test_an_id_in_an_unread_body_is_the_engines(upstream, tmp_path) -> None:
    async with Front(tmp_path, {"m": {"upstreams": [upstream.url]}}) as front:
        for path, options in (("/v1/render", {"json": {}}), ("/v1/load", {"data": None})):
            async with front.session.post(path, **options) as response:
                assert response.headers["X-Request-Id"]
    named = ["X-Request-Id" in asked.headers for asked in upstream.asked]
    assert named == [False, True]
