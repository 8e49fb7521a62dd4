"""What no client should send, over sockets, to a server whose engine refuses all of it.

Whatever comes gets no 500, holds nothing up, and leaves nothing in the tiers, and the log tells of
no failure.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.config.secrets import hash_key, new_key
from server.protocol.routes import CACHED_ROUTES
from tests.server.conftest import CHAT, Front, Upstream, answer, question, running
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

fuzzed = settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_MOST_BYTES = 100_000
_TURNS = 10
"""In so many turns a server has an answer of its engine."""
KEY = new_key()
GOOD = orjson.dumps(question())


async def refuse(http: web.Request) -> web.StreamResponse:
    await http.read()
    return web.json_response(
        {"error": {"message": "no engine takes this", "code": 400}}, status=400
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    """A server with a tenant, who may ask for anything."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "tenants.json").write_bytes(
        orjson.dumps({"us": {"keys": [hash_key(KEY)], "operator": True}})
    )
    sections = {"tenants": {"file": "tenants.json"}}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with running(folder, _upstream, sections=sections, headers=headers) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def sound(front: Front, upstream: Upstream) -> AsyncIterator[Front]:
    """A server that is found as it should be afterwards."""
    upstream.handler = refuse
    yield front
    assert await front.metric("tierserve_tier_entries") == 0
    log = front.log.read_text()
    assert "Traceback" not in log
    assert "a request failed" not in log


async def statuses_of(front: Front, sent: bytes, *, whole: bool = False) -> list[int]:
    """Send bytes and no more; return the statuses of the responses.

    A server that is told to close closes after it has answered a request that is `whole`; else it
    may wait for more, and is told after a while that nothing comes.

    Raises:
        TimeoutError: the connection stays, or the server answers nobody any more.
    """
    got = bytearray()
    async with asyncio.timeout(HANGS_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(sent)
        reading = asyncio.create_task(read_into(got, reader))
        if not whole:
            for _ in range(_TURNS):
                if not reading.done():
                    await front.ready()
            # It may have closed the connection just now.
            with suppress(OSError):
                writer.write_eof()
        await reading
        writer.close()
        assert await front.ready() == 200
    return [int(status) for status in _STATUS.findall(got)]


async def read_into(got: bytearray, reader: asyncio.StreamReader) -> None:
    # The server may have said that it takes no more of this.
    with suppress(ConnectionError):
        while piece := await reader.read(65536):
            got += piece


def head(first: bytes, *lines: bytes) -> bytes:
    ours = (b"Host: x", b"Connection: close", b"Authorization: Bearer " + KEY.encode())
    return b"\r\n".join((first, *ours, *lines)) + b"\r\n\r\n"


def head_of_post(path: str, *lines: bytes, content_type: bytes = b"application/json") -> bytes:
    first = b"POST " + path.encode() + b" HTTP/1.1"
    return head(first, b"Content-Type: " + content_type, *lines)


def post(body: bytes, path: str = CHAT, content_type: bytes = b"application/json") -> bytes:
    length = b"Content-Length: %d" % len(body)
    return head_of_post(path, length, content_type=content_type) + body


def are_refusals(statuses: list[int]) -> bool:
    # Hypothesis may come upon `only-if-cached`, which is refused by 504.
    return all(status in (100, 504) or 400 <= status < 500 for status in statuses)


OTHERS = "/v1/others"
paths = st.sampled_from([*sorted(CACHED_ROUTES), OTHERS])
fields = st.sampled_from(
    sorted(
        {"cache", "model", "seed", "stream", "stream_options", "temperature", "uuid"}.union(
            *(
                (*r.fields.defaults, *r.fields.ignored, *r.fields.media, *r.fields.unrepeatable)
                for r in CACHED_ROUTES.values()
            )
        )
    )
)
numbers = st.one_of(
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from((2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0)),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(fields | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
objects = st.dictionaries(fields, values, max_size=6)


@st.composite
def nested(draw: st.DrawFn) -> bytes:
    lists, objects, media = (b"[", b"]"), (b'{"content":', b"}"), (b'[{"uuid":"","content":', b"}]")
    opened, closed = draw(st.sampled_from((lists, objects, media)))
    depth = draw(st.integers(470, 515) | st.sampled_from((120, 250, 1000, 1024, 3_000)))
    inner = opened * depth + b"1" + closed * draw(st.sampled_from((depth, depth - 1)))
    name = draw(fields).encode()
    return draw(st.sampled_from((inner, b'{"temperature":0,"' + name + b'":' + inner + b"}")))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good body that lost its end, or has odd bytes in it, or says a thing twice."""
    at = draw(st.integers(0, len(GOOD)))
    odd = draw(
        st.sampled_from((b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x00", b"\\ud800", b"NaN", b","))
    )
    twice = json.dumps({draw(fields): draw(values)}).encode()[:-1] + b"," + GOOD[1:]
    return draw(st.sampled_from((GOOD[:at], GOOD[:at] + odd + GOOD[at:], twice)))


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    named = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    name, value = draw(st.sampled_from((b"model", b"x", b""))), draw(st.binary(max_size=20))
    return named % name + value + draw(st.sampled_from((b"\r\n--b--\r\n", b"--b--", b"--b", b"")))


bodies = st.one_of(
    st.binary(max_size=200),
    nested(),
    damaged(),
    forms(),
    values.map(lambda value: json.dumps(value).encode()),
)
content_types = st.sampled_from(
    (b"application/json", b"multipart/form-data; boundary=b", b"multipart/form-data", b"text/json")
)


@fuzzed
@given(bodies, paths, content_types)
async def test_bodies(sound: Front, body: bytes, path: str, content_type: bytes) -> None:
    statuses = await statuses_of(sound, post(body, path, content_type), whole=True)
    assert are_refusals(statuses)
    assert len(statuses) == 1


@fuzzed
@given(objects, paths)
async def test_wrong_types(sound: Front, fields: dict[str, Any], path: str) -> None:
    asked = question() | {"prompt": "x", "input": "x"} | fields
    statuses = await statuses_of(sound, post(json.dumps(asked).encode(), path), whole=True)
    assert are_refusals(statuses)
    assert len(statuses) == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/chat/completions/batch"])
async def test_no_depth_is_a_failure(sound: Front, path: str) -> None:
    for depth in range(900, 1030, 5):
        # The quick parser reads deeper than functions of Python can call each other.
        body = b'{"uuid":"","messages":' + b"[" * depth + b"]" * depth + b"}"
        assert await statuses_of(sound, post(body, path), whole=True) == [400]


@pytest.mark.parametrize("path", [CHAT, OTHERS])
@pytest.mark.parametrize("more", [1, 3_000_000])
async def test_gigantic_bodies(sound: Front, more: int, path: str) -> None:
    body = b'{"messages":"' + b"x" * (_MOST_BYTES + more) + b'"}'
    chunked = head_of_post(path, b"Transfer-Encoding: chunked")
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for sent in (post(body, path), chunked):
        # Who is still sending may not hear it.
        assert set(await statuses_of(sound, sent)) <= {413}


async def test_a_body_that_does_not_come(sound: Front) -> None:
    announced = head_of_post(CHAT, b"Content-Length: 99999999999999")
    assert are_refusals(await statuses_of(sound, announced + b"{"))


names = st.sampled_from(
    (
        b"Accept", b"Accept-Encoding", b"Authorization", b"Cache-Control", b"Connection",
        b"Content-Encoding", b"Content-Length", b"Content-Type", b"Cookie", b"Expect", b"Host",
        b"If-None-Match", b"TE", b"Transfer-Encoding", b"Upgrade", b"X-Api-Key", b"X-Request-Id",
    )
) | st.binary(max_size=10)  # fmt: skip
header_values = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode(errors="replace")),
    st.sampled_from(
        (
            b"", b"-1", b"+5", b"0", b"0x1", b"1, 2", b"99999999999999999999", b"chunked",
            b"gzip", b"gzip, chunked", b"chunked, chunked", b"br", b"zstd", b"identity", b"close",
            b"100-continue", b"websocket", b"h2c", b"*", b'"', b'W/"', b"no-cache, max-age=",
            b"max-age=99999999999999999999", b"max-age=-1", b"max-stale=\xff", b"\xe9\xff",
            b"application/json; charset=utf-7", b"multipart/form-data; boundary=", b"a" * 9000,
        )
    ),
)  # fmt: skip


@fuzzed
@given(st.lists(st.tuples(names, header_values), max_size=5), paths)
async def test_headers(sound: Front, headers: list[tuple[bytes, bytes]], path: str) -> None:
    lines = [name + b": " + value for name, value in headers]
    length = b"Content-Length: %d" % len(GOOD)
    sent = head_of_post(path, length, *lines) + GOOD
    assert are_refusals(await statuses_of(sound, sent))


methods = st.binary(max_size=8) | st.sampled_from(
    (b"GET", b"HEAD", b"PUT", b"CONNECT", b"TRACE", b"OPTIONS", b"PRI", b"post")
)
targets = st.binary(max_size=30) | st.sampled_from(
    (
        b"*", b"/", b"//", b"/%", b"/%00", b"/%ff", b"/../..", b"/v1/chat/completions?%zz",
        b"http://", b"http://[", b"http://[::1", b"http://x:99999/v1/models", b"x:y",
        b"//[/v1", b"http://x/%2e%2e", b"/" + b"a" * 9000, b"/\xe9", b"/?" + b"&" * 500,
    )
)  # fmt: skip
versions = st.sampled_from((b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"HTTP", b""))


@fuzzed
@given(methods, targets, versions)
async def test_first_lines(sound: Front, method: bytes, target: bytes, version: bytes) -> None:
    statuses = await statuses_of(sound, head(b" ".join((method, target, version))))
    # There are pages, too.
    assert all(status < 500 for status in statuses)


async def test_what_has_no_path_goes_to_no_engine(sound: Front, upstream: Upstream) -> None:
    for first in (b"OPTIONS *", b"CONNECT engine:80", b"CONNECT /v1/models"):
        assert await statuses_of(sound, head(first + b" HTTP/1.1"), whole=True) == [400]
    assert upstream.asked == []


sizes = st.one_of(
    st.integers(0, 60).map(lambda size: b"%x" % size),
    st.sampled_from(
        (b"", b"-1", b"0x5", b"g", b"f" * 16, b"f" * 40, b"5;x=y", b"5 ", b"05", b"5\n")
    ),
)
chunks = st.tuples(sizes, st.sampled_from((b"\r\n", b"\n", b"\r", b"")), st.binary(max_size=60))
ends = st.sampled_from(
    (b"0\r\n\r\n", b"0\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n\xff\r\n\r\n", b"\r\n", b"")
)


@fuzzed
@given(st.lists(chunks, max_size=4), ends, paths)
async def test_chunks(
    sound: Front, chunks: list[tuple[bytes, bytes, bytes]], end: bytes, path: str
) -> None:
    body = b"".join(size + line_end + data + line_end for size, line_end, data in chunks)
    sent = head_of_post(path, b"Transfer-Encoding: chunked") + body + end
    assert are_refusals(await statuses_of(sound, sent))


async def test_good_requests_are_still_answered(sound: Front, upstream: Upstream) -> None:
    upstream.handler = answer
    asked = question(temperature=1)
    for _ in range(2):
        assert (await sound.ask(asked))[0] == 200
