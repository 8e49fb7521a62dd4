"""A model's fallback: when it answers, that it says so, and that nothing is kept as the other's."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from tests.server.conftest import (
    CHAT,
    ROLE,
    Front,
    Upstream,
    body,
    chunk,
    free_port,
    held,
    question,
    stream,
)
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAID = "X-Tierserve-Fallback"


def saying(text: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def say(http: web.Request) -> web.StreamResponse:
        asked = orjson.loads(await http.read())
        if http.path != CHAT or not asked.get("stream"):
            return web.json_response(body(text))
        end = (chunk({}, "stop"), chunk(None), b"data: [DONE]\n\n")
        return await stream(http, ROLE, chunk({"content": text}), *end)

    return say


def failing(status: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def fail(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "of m"}}, status=status)

    return fail


class Reply(NamedTuple):
    status: int
    by: str | None
    """Which model the answer says has answered in another one's place."""
    how: str
    """Its Cache-Status."""
    body: bytes


class Three:
    """A front before `m`, its fallback `n`, and `down`, which falls back to `m`.

    A stale answer of `sie` is served where it fails; its fallback is `n`, too. Of `free` nobody
    knows that it is a vLLM.
    """

    def __init__(self, front: Front, m: Upstream, n: Upstream) -> None:
        self.front, self.m, self.n = front, m, n

    async def ask(self, path: str = CHAT, headers: dict | None = None, **asked) -> Reply:
        async with self.front.session.post(path, json=asked, headers=headers) as response:
            by = response.headers.get(SAID)
            assert (by is not None) is (response.headers.get("Cache-Control") == "no-store")
            how = response.headers.get("Cache-Status", "")
            return Reply(response.status, by, how, await response.read())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _three(tmp_path_factory) -> AsyncIterator[Three]:
    async with Upstream() as m, Upstream() as n:
        of_m = {"upstreams": [m.url], "fallback": "small"}
        models = {
            "m": of_m | {"vllm": {}, "adapters": {"poet": "hub/poet"}},
            "n": {"upstreams": [n.url], "vllm": {}, "aliases": ["small"]},
            "sie": of_m | {"vllm": {}},
            "free": of_m,
            "down": {"upstreams": [f"http://127.0.0.1:{free_port()}"], "fallback": "m"},
        }
        folder = tmp_path_factory.mktemp("three")
        front = Front(folder, models, sections={"cache": {"obey_upstreams": False}})
        try:
            # `down` never is.
            until_ready, front.until_ready = front.until_ready, nothing
            await front.start()
            front.until_ready = until_ready
            for each in ("m", "n", "sie", "free"):
                await front.until_ready(model=each)
            yield Three(front, m, n)
        finally:
            await front.stop()


async def nothing() -> None:
    pass


@pytest_asyncio.fixture(loop_scope="module")
async def three(_three: Three) -> Three:
    _three.m.handler, _three.n.handler = failing(503), saying("by n")
    _three.m.asked.clear()
    _three.n.asked.clear()
    return _three


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "stream"])
@pytest.mark.parametrize("chance", [0, 1])
@pytest.mark.parametrize("name", ["m", "poet", None, "free", "down"])
async def test_it_answers_and_says_so(
    three: Three, name: str | None, chance: int, more: dict
) -> None:
    reply = await three.ask(**question(model=name, temperature=chance), **more)
    assert (reply.status, reply.by) == (200, "n")
    assert b"by n" in reply.body
    (asked,) = three.n.asked
    assert orjson.loads(await asked.read())["model"] == "n"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", question()),
    ],
)
@pytest.mark.parametrize("chance", [0, 1])
async def test_on_every_route_of_text(three: Three, path: str, asked: dict, chance: int) -> None:
    reply = await three.ask(path, **asked | {"model": "m", "max_tokens": 1, "temperature": chance})
    assert reply[:2] == (200, "n")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 400, None])
@pytest.mark.parametrize("chance", [0, 1])
async def test_only_where_nobody_answers(three: Three, status: int | None, chance: int) -> None:
    async def cut(http: web.Request) -> web.StreamResponse:
        http.transport.abort()
        return web.Response()

    three.m.handler = cut if status is None else failing(status)
    reply = await three.ask(**question(temperature=chance))
    if status in (400, 500):
        assert (reply[:2], b"of m" in reply.body) == ((status, None), True)
    else:
        assert reply[:2] == (200, "n")


async def test_nothing_is_kept_as_the_others(three: Three) -> None:
    asked = question()
    first = await three.ask(model="m", **asked)
    assert (first.by, first.how) == ("n", "tierserve; fwd=miss")
    # It may be a hit of its own, for both.
    async with asyncio.timeout(HANGS_S):
        while "; hit" not in (again := await three.ask(model="m", **asked)).how:
            pass
    assert again.by == "n"
    of_n = await three.ask(model="n", **asked)
    assert (of_n.by, "; hit" in of_n.how) == (None, True)
    assert len(three.n.asked) == 1
    three.m.handler = saying("by m")
    back = await three.ask(model="m", **asked)
    assert (back.by, back.how, b"by m" in back.body) == (None, "tierserve; fwd=miss", True)


async def test_those_who_waited_for_the_other_are_each_told(three: Three) -> None:
    go = asyncio.Event()

    async def late(http: web.Request) -> web.StreamResponse:
        await go.wait()
        return await failing(503)(http)

    three.m.handler, asked = late, question(model="m")
    waiting = [asyncio.create_task(three.ask(**asked)) for _ in range(3)]
    async with asyncio.timeout(HANGS_S):
        while not three.m.asked:
            await three.front.ready()
    go.set()
    assert {reply.by for reply in await asyncio.gather(*waiting)} == {"n"}
    assert len(three.n.asked) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"cache": {"fallback": False}},
        {"cache": {"fallback": False}, "temperature": 1},
        {"logit_bias": {"5": 1}},
        {"model": "n"},
    ],
)
async def test_not_where_it_is_not_wanted_or_means_something_else(three: Three, more: dict) -> None:
    three.n.handler = failing(503)
    reply = await three.ask(**question() | more)
    assert (reply.status, reply.by) == (503, None)
    assert len(three.n.asked) == (more.get("model") == "n")


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/completions", {"prompt": [[1], [2]], "temperature": 1}),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1", "store": False}),
        ("/v1/responses", {"input": "a", "model": "free"}),
        ("/v1/some/route", {"prompt": "a"}),
    ],
)
async def test_routes_and_bodies_that_have_none(three: Three, path: str, more: dict) -> None:
    reply = await three.ask(path, **{"model": "m"} | more)
    assert (reply.status, reply.by, three.n.asked) == (503, None, [])


async def test_what_may_have_had_an_effect_is_not_asked_twice(three: Three) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://h/cat.png"}}
    asked = {"messages": [{"role": "user", "content": [image]}]}
    # Media elsewhere may change, but to look at them does nothing.
    assert (await three.ask(**asked))[:2] == (200, "n")
    three.n.asked.clear()
    asked["tools"] = [{"type": "web_search"}]
    assert (await three.ask(**asked))[:2] == (503, None)
    # Nothing was sent to `down`, but then to its fallback.
    reply = await three.ask(model="down", **asked)
    assert (reply.status, reply.by, three.n.asked) == (503, "m", [])
    three.m.handler = saying("by m")
    assert (await three.ask(model="down", **asked))[:2] == (200, "m")


async def test_where_it_fails_too_the_first_error_is_given(three: Three) -> None:
    three.m.handler = failing(429)
    for chance in (0, 1):
        for status in (400, 503):
            three.n.handler = failing(status)
            reply = await three.ask(**question(temperature=chance))
            assert (reply.status, reply.by, b"of m" in reply.body) == (429, None, True)


async def test_a_stale_answer_of_the_right_model_comes_first(three: Three) -> None:
    three.m.handler, asked = saying("by m"), question(model="sie")
    await three.front.ask_alone(asked)
    three.m.handler = failing(503)
    reply = await three.ask(**asked)
    assert (reply.by, "fwd=stale" in reply.how) == (None, True)
    assert (await three.ask(**question(model="sie"))).by == "n"


async def test_controls_keep_their_meaning(three: Three) -> None:
    asked = question()
    await three.front.ask_alone(asked | {"model": "n"})
    only = {"Cache-Control": "only-if-cached"}
    assert (await three.ask(headers=only, **asked))[:2] == (504, None)
    reply = await three.ask(headers={"Cache-Control": "no-cache"}, **asked)
    assert (reply.by, reply.how) == ("n", "tierserve; fwd=request")
    reply = await three.ask(headers={"Cache-Control": "no-store"}, **asked)
    assert (reply.by, reply.how) == ("n", "tierserve; fwd=bypass")
    assert len(three.n.asked) == 3


async def test_a_stream_that_has_begun_is_not_taken_over(three: Three) -> None:
    async def cut(http: web.Request) -> web.StreamResponse:
        response = await stream(http, ROLE)
        http.transport.close()
        return response

    three.m.handler = cut
    reply = await three.ask(**question(stream=True))
    assert (reply.status, reply.by, b"error" in reply.body) == (200, None, True)
    with pytest.raises(aiohttp.ClientPayloadError):
        await three.ask(**question(stream=True, temperature=1))
    assert three.n.asked == []


async def test_what_an_upstream_says_of_its_own_fallback_is_passed_on(three: Three) -> None:
    async def inner(http: web.Request) -> web.StreamResponse:
        if orjson.loads(await http.read()).get("stream"):
            whole = (chunk({"content": "yes"}, "stop"), chunk(None), b"data: [DONE]\n\n")
            return await stream(http, ROLE, *whole, headers={SAID: "o"})
        return web.json_response(body(), headers={SAID: "o", "Cache-Control": "no-store"})

    three.m.handler = inner
    for more in ({}, {"stream": True}):
        asked = question(model="m", **more)
        for _ in range(2):
            assert (await three.ask(**asked))[:2] == (200, "o")
    assert len(three.m.asked) == 4
    # The upstream can't know what its client's clients refuse.
    for more in ({}, {"stream": True}, {"temperature": 1}):
        refused = await three.ask(**question(cache={"fallback": False}, **more))
        assert refused[:2] == (503, None)
    assert three.n.asked == []


async def test_log_and_metrics_tell(three: Three) -> None:
    counted = 'tierserve_fallbacks_total{fallback="n",model="m"}'
    answered = 'tierserve_requests_total{model="n",outcome="miss"'
    before = [await three.front.metric(line) for line in (counted, answered)]
    id_ = "of-the-fallback"
    await three.ask(headers={"X-Request-Id": id_}, **question())
    after = [await three.front.metric(line) for line in (counted, answered)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]
    await three.front.until_logged(id_)
    (line,) = [each for each in three.front.log.read_text().splitlines() if id_ in each]
    logged = orjson.loads(line)
    assert (logged["model"], logged["fallback"], logged["outcome"]) == ("m", "n", "miss")


async def test_a_first_token_that_comes_late_is_waited_for(three: Three) -> None:
    go = asyncio.Event()
    three.n.handler = held(go)
    async with three.front.post(question(stream=True)) as response:
        assert response.headers[SAID] == "n"
        go.set()
        assert b"yes" in await response.read()
