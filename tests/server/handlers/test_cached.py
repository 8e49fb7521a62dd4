"""Cached routes over HTTP: hits, misses, streams, stale answers, and `Cache-Control`."""

import asyncio
import re
import time
from functools import partial

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
    stream,
)
from tests.waiting import HANGS_S
from tiers import Answer, Chain, DiskCache, FrequencySketch, Freshness, Tier

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_hit_is_the_miss_with_an_id_of_its_own(front: Front, upstream: Upstream) -> None:
    asked, began = question(), time.time()
    answers = []
    for status in ("tierserve; fwd=miss", r"tierserve; hit; ttl=\d+; detail=memory"):
        async with front.post(asked) as response:
            assert re.fullmatch(status, response.headers["Cache-Status"])
            assert 0 <= int(response.headers["Age"]) <= time.time() - began
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


@pytest.mark.parametrize("streams", [False, True])
async def test_a_known_request_gets_its_encoding_when_the_answer_gets_another(
    front: Front, upstream: Upstream, streams: bool
) -> None:
    asked = question(stream=streams)
    # Until its bytes are known.
    for _ in range(4):
        await front.ask_alone(asked)
    other = asked | {"stream": not streams, "cache": {"mode": "no-cache"}}
    assert (await front.ask(other))[1] == "tierserve; fwd=request"
    for _ in range(2):
        _, status, text = await front.ask_alone(asked)
        assert "; hit; " in status
        assert text.startswith(b"data: " if streams else b"{")
    assert len(upstream.asked) == 2


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
        # What is read of a connection is lost once its end is noticed, an error as well.
        if http.transport is not None and message == CUT:
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
    aborted = 'tierserve_requests_total{model="m",outcome="aborted"'
    before = await front.metric(aborted)

    async def endless(http: web.Request) -> web.StreamResponse:
        return await stream(http, ROLE, never)

    upstream.handler = endless
    async with front.session.post(path, json=question(stream=True)) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await asyncio.wait_for(upstream.aborted.wait(), HANGS_S)
    await front.until_metric(aborted, before + 1)


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


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"Cache-Control": "no-store"}, ["tierserve; fwd=bypass"] * 2),
        ({"Content-Type": "text/plain"}, ["tierserve; fwd=bypass"] * 2),
        ({"Cache-Control": "max-age=0, No-Cache"}, ["tierserve; fwd=request"] * 2),
    ],
)
async def test_cache_control_of_a_request(
    front: Front, upstream: Upstream, sent: dict, expected: list[str]
) -> None:
    asked = question()
    headers = {"Content-Type": "application/json"} | sent
    data = orjson.dumps(asked)
    statuses = []
    async with asyncio.timeout(HANGS_S):
        while len(statuses) < 2:
            async with front.session.post(CHAT, data=data, headers=headers) as response:
                assert response.status == 200
                statuses += [s for s in [response.headers["Cache-Status"]] if "collapsed" not in s]
    assert statuses == expected
    stored = "no-store" not in sent.values() and "text/plain" not in sent.values()
    assert ("hit" in (await front.ask(asked))[1]) is stored


async def test_a_query_bypasses_the_tiers_of_an_unknown_engine(
    front: Front, upstream: Upstream
) -> None:
    for _ in range(2):
        path = f"{CHAT}?api-version=3"
        async with front.session.post(path, json=question(model="n")) as response:
            assert response.headers["Cache-Status"] == "tierserve; fwd=bypass"
    assert upstream.asked[0].query_string == "api-version=3"


async def test_a_query_changes_no_answer_of_a_vllm(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask_alone(asked)
    async with front.session.post(f"{CHAT}?beta=true&model=n", json=asked) as response:
        assert "hit" in response.headers["Cache-Status"]


@pytest.mark.parametrize("name", ["anthropic-beta", "openai-organization"])
async def test_a_repeated_header_is_part_of_the_key(front: Front, upstream, name: str) -> None:
    asked = question(model="n")
    for values in (["a", "b"], ["a"], ["b"], ["a, b"], ["b", "a"]):
        headers = CIMultiDict((name, each) for each in values)
        assert (await front.ask(asked, headers=headers))[1] == "tierserve; fwd=miss"
        assert upstream.asked[-1].headers.getall(name) == values


async def test_answers_are_not_shared_between_credentials(front: Front, upstream: Upstream) -> None:
    asked = question()
    for credential in ("Bearer a", "Bearer b"):
        headers = {"Authorization": credential}
        assert (await front.ask(asked, headers=headers))[1] == "tierserve; fwd=miss"
        assert "hit" in (await front.ask(asked, headers=headers))[1]
    assert [http.headers["Authorization"] for http in upstream.asked] == ["Bearer a", "Bearer b"]


async def test_nondeterministic_requests_bypass_the_tiers(front: Front, upstream: Upstream) -> None:
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
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HANGS_S)
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    error = orjson.loads(await reader.readexactly(length))["error"]
    writer.close()
    assert re.match(rb"HTTP/1.[01] %d " % status, head)
    assert error["code"] == status
    assert error["param"] == ("body" if "JSON" in error["message"] else None)
    assert error["type"].endswith("Error")
    assert b"Server: tierserve" in head
    assert upstream.asked == []


async def test_a_stale_answer_is_given_while_a_new_one_is_made(
    front: Front, upstream: Upstream
) -> None:
    async def newer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body("newer"))

    asked = question(model="swr")
    await front.ask(asked)
    upstream.handler = newer
    texts = []
    async with asyncio.timeout(HANGS_S):
        while not texts or b"newer" not in texts[-1]:
            _, cache_status, text = await front.ask(asked)
            # The newer answer may still be on its way to the tiers.
            is_joined = b"newer" in text and cache_status == "tierserve; fwd=miss; collapsed"
            hit = r"tierserve; hit; ttl=-\d+; detail=memory"
            assert is_joined or re.fullmatch(hit, cache_status)
            texts.append(text)
    assert b"yes" in texts[0]
    assert len(upstream.asked) >= 2


async def test_a_request_limits_the_age_of_its_answer(front: Front, upstream: Upstream) -> None:
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
    assert re.fullmatch(hit, (await status_of(stale, "max-stale=3600, only-if-cached"))[1])
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


async def test_what_was_stored_at_another_time(upstream: Upstream, tmp_path) -> None:
    async def no_store(_: web.Request) -> web.StreamResponse:
        return web.json_response(body(), headers={"Cache-Control": "no-store"})

    asked, early = question(), [question(), question()]
    stored_at = time.time() - 1000
    front = Front(tmp_path, alike(upstream.url), sections={"cache": {"obey_upstreams": False}})
    for each in early:
        await plant(front, each, time.time() + 3600, 3)
    # Last: it would have expired by then.
    await plant(front, asked, stored_at, 2000)
    async with front:
        await front.until_metric('tierserve_tier_entries{tier="disk"}', 3)
        # Its age counts from then.
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
        # What comes from the future is a miss.
        for each, headers in zip(early, ({}, {"Cache-Control": "max-age=1"}), strict=True):
            status, how, text = await front.ask(each, headers=headers)
            assert (status, how, b"old" in text) == (200, "tierserve; fwd=miss", False)
        _, how, text = await front.ask_alone(early[0])
        assert ("hit; ttl=" in how, b"old" in text) == (True, False)
        # What an upstream forbids doesn't count where the configuration says so.
        upstream.handler, forbidden = no_store, question()
        await front.ask(forbidden)
        assert "hit" in (await front.ask_alone(forbidden))[1]


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
        ("public, max-age=9000", r"tierserve; hit; ttl=\d{4}; detail=memory"),
    ],
)
async def test_an_upstreams_cache_control_bounds_freshness(
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
