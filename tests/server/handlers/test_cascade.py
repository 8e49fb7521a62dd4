"""A tierserve whose upstream is another one, or has another cache before it."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from tests.server.conftest import Front, Upstream, answer, body, question, running
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")
NAMED = {"Server": "tierserve"}


class Inner:
    """Makes an upstream look like a tierserve, whose engine is ready or not."""

    def __init__(self, upstream: Upstream) -> None:
        self.is_ready, self.asked = True, []
        self._upstream = upstream
        upstream.lists, upstream.handler = self._lists, self._handle

    async def _lists(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"data": []}, headers=NAMED)

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        if http.path != "/ready":
            return await answer(http)
        self.asked.append(http.query["model"])
        return web.Response(status=200 if self.is_ready else 503, headers=NAMED)


@pytest_asyncio.fixture(loop_scope="module")
async def inner(own_upstream: Upstream, tmp_path) -> AsyncIterator[tuple[Inner, Front]]:
    made = Inner(own_upstream)
    async with running(tmp_path, own_upstream) as front:
        yield made, front


async def test_it_is_ready_when_its_engine_is(inner: tuple[Inner, Front]) -> None:
    made, front = inner
    assert set(made.asked) == {"m", "n", "swr", "sie"}
    made.is_ready = False
    await front.until_ready(503, model="m")
    async with front.session.get("/ready?model=m") as response:
        assert (await response.json())["models"] == {"m": "starting"}
    # What it holds, it answers.
    status, _, _ = await front.ask(question())
    assert status == 200
    made.is_ready = True
    await front.until_ready(200)


async def test_what_is_said_in_the_body_reaches_other_caches(
    front: Front, upstream: Upstream
) -> None:
    async def sent_directives(mode: str | None, **headers: str) -> list[str]:
        cache = {"mode": mode}
        await front.ask_alone(question(cache=cache), headers=headers)
        return upstream.asked[-1].headers.getall("Cache-Control", [])

    assert await sent_directives(None) == []
    assert await sent_directives("no-cache") == ["no-cache"]
    assert await sent_directives("no-store") == ["no-store"]
    assert await sent_directives("no-cache", **{"Cache-Control": "max-age=5"}) == [
        "max-age=5",
        "no-cache",
    ]


async def test_a_refresh_asks_for_a_new_answer(front: Front, upstream: Upstream) -> None:
    asked = question(model="swr")
    await front.ask_alone(asked)
    assert "Cache-Control" not in upstream.asked[-1].headers
    assert (await front.ask(asked))[1].startswith("tierserve; hit; ttl=-")
    async with asyncio.timeout(HANGS_S):
        while len(upstream.asked) < 2:
            await front.ask(asked)
    assert upstream.asked[-1].headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(("age", "age_s"), [("100", 100), ("-1", 0), ("x", 0), ("9" * 400, None)])
async def test_the_age_of_what_others_kept_counts(
    front: Front, upstream: Upstream, age: str, age_s: int | None
) -> None:
    async def aged(_: web.Request) -> web.StreamResponse:
        return web.json_response(body(), headers={"Age": age})

    upstream.handler = aged
    asked, began = question(), time.time()
    async with front.post(asked) as response:
        assert int(response.headers["Age"]) == age_s or age_s is None
    status = (await front.ask_alone(asked))[1]
    if age_s is None:
        assert status == "tierserve; fwd=miss"
        return
    async with front.post(asked) as response:
        assert response.headers["Cache-Status"].startswith("tierserve; hit")
        assert age_s <= int(response.headers["Age"]) <= age_s + time.time() - began


async def test_who_wants_a_new_answer_does_not_join_who_takes_an_old_one(
    front: Front, upstream: Upstream
) -> None:
    comes, waits = asyncio.Event(), asyncio.Event()

    async def old(http: web.Request) -> web.StreamResponse:
        if "Cache-Control" in http.headers:
            return web.json_response(body("new"))
        comes.set()
        await waits.wait()
        return web.json_response(body("old"), headers={"Age": "3000"})

    upstream.handler = old
    asked = question()
    first = asyncio.create_task(front.ask(asked))
    try:
        await asyncio.wait_for(comes.wait(), HANGS_S)
        for control in ("no-cache", "max-age=60"):
            async with front.post(asked, headers={"Cache-Control": control}) as response:
                assert (await response.json())["choices"][0]["message"]["content"] == "new"
    finally:
        waits.set()
        await first


SENT = {"Cookie": "a=b", "Accept-Language": "de", "X-Odd": "1", "User-Agent": "me"}


async def test_what_could_change_an_answer_goes_on_or_is_in_its_key(
    front: Front, upstream: Upstream
) -> None:
    asked = question(model="n")
    await front.ask_alone(asked, headers=SENT)
    assert {name: upstream.asked[-1].headers.get(name) for name in SENT} == {
        "Cookie": None,
        "Accept-Language": None,
        "X-Odd": None,
        "User-Agent": "me",
    }
    assert "hit" in (await front.ask(asked, headers={"Cookie": "c=d"}))[1]
    for name in ("Anthropic-Beta", "OpenAI-Project", "openai-organization"):
        assert "miss" in (await front.ask_alone(asked, headers={name: "b"}))[1]
        assert upstream.asked[-1].headers[name] == "b"
        assert "hit" in (await front.ask(asked, headers={name.upper(): "b"}))[1]
        assert "miss" in (await front.ask(asked, headers={name: "c"}))[1]


async def test_no_header_changes_what_a_vllm_answers(front: Front, upstream: Upstream) -> None:
    asked = question()
    await front.ask_alone(asked, headers={"Anthropic-Beta": "a"})
    assert upstream.asked[-1].headers["Anthropic-Beta"] == "a"
    assert "hit" in (await front.ask(asked, headers={"Anthropic-Beta": "b", "OpenAI-Beta": "c"}))[1]


async def test_a_load_balancer_is_told_how_an_engine_is_when_it_was_asked(
    front: Front, upstream: Upstream
) -> None:
    async def loaded(http: web.Request) -> web.StreamResponse:
        load = http.headers.get("endpoint-load-metrics-format", "none")
        return web.json_response(body(), headers={"endpoint-load-metrics": f"{load} a=0.5"})

    upstream.handler = loaded
    for asked, expected in (
        (question(), ["TEXT a=0.5", None]),
        (question(temperature=1), ["TEXT a=0.5", "TEXT a=0.5"]),
    ):
        for load in expected:
            async with front.post(asked, headers={"Endpoint-Load-Metrics-Format": "TEXT"}) as reply:
                assert reply.headers.get("Endpoint-Load-Metrics") == load
            await front.ask_alone(asked)
    async with front.post(question()) as reply:
        assert "Endpoint-Load-Metrics" not in reply.headers


async def test_all_goes_on_with_what_is_not_kept(front: Front, upstream: Upstream) -> None:
    await front.ask(question(temperature=1), headers=SENT)
    assert SENT.items() <= dict(upstream.asked[-1].headers).items()
