"""Which of several upstreams gets a request, over real sockets, and what goes on to another."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from server.engine.routing.ejection import FAILURES
from tests.server.conftest import CHAT, Front, Upstream, answer, body, held, question
from tests.server.workers.fleet import Fleet
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

_number = itertools.count()


def models_of(upstreams: list[Upstream]) -> dict[str, dict]:
    """Models of the same upstreams, by the routing of each."""
    urls = [upstream.url for upstream in upstreams]
    return {
        "m": {"upstreams": urls, "vllm": {}},
        "least": {"upstreams": urls, "vllm": {}, "routing": "least"},
        "turns": {"upstreams": urls, "vllm": {}, "routing": "round_robin"},
        "one": {"upstreams": urls, "vllm": {}, "max_requests": 1},
    }


class Several(NamedTuple):
    """A server, and the upstreams that it chooses among."""

    front: Front
    upstreams: list[Upstream]

    async def asked_for(self, asked: dict, path: str = CHAT, **options) -> int:
        """Send a request that the tiers don't know; returns the number of its upstream."""
        before = self.counts()
        async with self.front.session.post(path, json=asked, **options) as reply:
            assert reply.status == 200
            await reply.read()
        return self.sent_since(before).index(1)

    def sent_since(self, before: list[int]) -> list[int]:
        """Return how many requests each upstream got since there were so many."""
        return [now - then for then, now in zip(before, self.counts(), strict=True)]

    def counts(self) -> list[int]:
        return [len(upstream.asked) for upstream in self.upstreams]


def chat(system: str, *messages: str, **more) -> dict:
    system = f"{system} {'You answer in short sentences. ' * 20}"
    listed = [{"role": "system", "content": system}]
    listed += [{"role": "user", "content": message} for message in messages]
    return {"model": "m", "temperature": 0, "messages": listed} | more


def unheard() -> str:
    return f"What is {next(_number)}?"


async def breaking(http: web.Request) -> web.StreamResponse:
    await http.read()
    assert http.transport is not None
    http.transport.abort()
    return web.Response()


def saying(status: int) -> Callable:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status)

    return refuse


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _several(tmp_path_factory) -> AsyncIterator[Several]:
    async with Upstream() as one, Upstream() as two, Upstream() as three:
        upstreams = [one, two, three]
        async with Front(tmp_path_factory.mktemp("several"), models_of(upstreams)) as front:
            several = Several(front, upstreams)
            await until_all_up(several)
            yield several


async def until_all_up(several: Several) -> None:
    """Wait until each model has all upstreams; each probes them on its own."""
    all_up = len(models_of(several.upstreams)) * len(several.upstreams)
    await several.front.until_metric("tierserve_upstream_up{", all_up)


@pytest_asyncio.fixture(loop_scope="module")
async def several(_several: Several) -> Several:
    for upstream in _several.upstreams:
        upstream.handler = answer
    return _several


async def test_prompts_that_begin_alike_have_one_upstream(several: Several) -> None:
    homes = set()
    # By chance of their ports, one may be the home of few.
    for system in map(str, range(200)):
        asked = [await several.asked_for(chat(system, unheard())) for _ in range(3)]
        # What isn't kept takes the same way.
        asked.append(await several.asked_for(chat(system, unheard(), temperature=1)))
        (home,) = set(asked)
        homes.add(home)
        if len(homes) == 3:
            break
    assert homes == {0, 1, 2}


async def test_a_conversation_stays_where_it_began(several: Several) -> None:
    said = [unheard() * 20]
    homes = set()
    for _ in range(4):
        homes.add(await several.asked_for(chat("A conversation.", *said)))
        said += ["yes", unheard() * 20]
    assert len(homes) == 1


@pytest.mark.parametrize("route", [CHAT, "/v1/responses"])
async def test_a_session_has_one_upstream(several: Several, route: str) -> None:
    def asked(**more) -> dict:
        content = unheard()
        prompt = (
            {"messages": [{"role": "user", "content": content}]}
            if route == CHAT
            else {"input": content}
        )
        return {"model": "m", "temperature": 1} | prompt | more

    by_header, by_field = [], []
    for number in range(20):
        headers = {"X-Session-Id": f"session {number}"}
        by_header.append(
            {await several.asked_for(asked(), route, headers=headers) for _ in range(3)}
        )
        key = f"key {number}"
        by_field.append(
            {await several.asked_for(asked(prompt_cache_key=key), route) for _ in range(3)}
        )
    for homes in (by_header, by_field):
        assert all(len(each) == 1 for each in homes)
        assert len(set.union(*homes)) > 1


async def test_turns_and_least(several: Several) -> None:
    turns = [await several.asked_for(chat("T", unheard(), model="turns")) for _ in range(6)]
    assert sorted(turns) == [0, 0, 1, 1, 2, 2]
    go = asyncio.Event()
    for upstream in several.upstreams:
        upstream.handler = held(go)
    before = several.counts()
    asked = [chat("L", unheard(), model="least", stream=True) for _ in range(6)]
    waiting = [asyncio.create_task(several.front.ask(each)) for each in asked]
    async with asyncio.timeout(HANGS_S):
        while sum(several.counts()) < sum(before) + 6:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    # Each was counted before the next was sent, so none got more than its part.
    assert several.sent_since(before) == [2, 2, 2]
    go.set()
    assert [status for status, *_ in await asyncio.gather(*waiting)] == [200] * 6


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_what_may_be_sent_twice_goes_on_to_another(several: Several, status: int) -> None:
    asked = chat(f"Refused with {status}.", unheard())
    home = await several.asked_for(asked)
    several.upstreams[home].handler = saying(status)
    for more in ({}, {"temperature": 1}, {"stream": True}):
        before = several.counts()
        status_, _, text = await several.front.ask(
            chat(f"Refused with {status}.", unheard(), **more)
        )
        assert (status_, b"yes" in text) == (200, True)
        assert sorted(several.sent_since(before)) == [0, 1, 1]


async def test_a_connection_that_breaks_before_the_answer_goes_on_once(several: Several) -> None:
    home = await several.asked_for(chat("Breaks.", unheard()))
    several.upstreams[home].handler = breaking
    for more in ({}, {"temperature": 1}, {"stream": True}):
        before = several.counts()
        status, _, text = await several.front.ask(chat("Breaks.", unheard(), **more))
        assert (status, b"yes" in text) == (200, True)
        # It is sent to the first anew where a kept connection was closed.
        assert several.sent_since(before).count(0) == 1
    # What ends one engine must not end all of them.
    for upstream in several.upstreams:
        upstream.handler = breaking
    before = several.counts()
    assert (await several.front.ask(chat("Breaks.", unheard(), model="least")))[0] == 502
    assert several.sent_since(before).count(0) == 1


async def test_media_elsewhere_have_no_effect(several: Several) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    asked = chat("Look.", unheard())
    asked["messages"][-1]["content"] = [part]
    home = await several.asked_for(asked)
    several.upstreams[home].handler = saying(503)
    before = several.counts()
    assert (await several.front.ask(asked))[0] == 200
    assert sorted(several.sent_since(before)) == [0, 1, 1]


async def test_other_statuses_are_answers(several: Several) -> None:
    home = await several.asked_for(chat("Other statuses.", unheard()))
    for status in (400, 404, 500):
        several.upstreams[home].handler = saying(status)
        before = sum(several.counts())
        assert (await several.front.ask(chat("Other statuses.", unheard())))[0] == status
        assert sum(several.counts()) == before + 1


async def test_where_all_refuse_the_last_reply_is_the_answer(several: Several) -> None:
    for upstream in several.upstreams:
        upstream.handler = saying(429)
    before = sum(several.counts())
    async with several.front.post(chat("All refuse.", unheard(), temperature=1)) as reply:
        assert reply.status == 429
        assert await reply.json() == {"error": {"message": "no"}}
    assert sum(several.counts()) == before + 3


async def test_what_may_have_had_an_effect_is_sent_once(several: Several) -> None:
    for upstream in several.upstreams:
        upstream.handler = saying(503)
    # Of another model than other tests', which should find none ejected.
    search = {"model": "least", "input": unheard(), "tools": [{"type": "web_search"}]}
    for path, asked in (("/v1/responses", search), ("/v1/others", {"model": "least"})):
        before = sum(several.counts())
        async with several.front.session.post(path, json=asked) as reply:
            assert reply.status == 503
        assert sum(several.counts()) == before + 1


async def test_a_kept_answer_is_looked_for_where_it_is(several: Several) -> None:
    kept = {"resp_a": 0, "resp_b": 1, "resp_c": 2}

    def keeping(number: int) -> Callable:
        async def handle(http: web.Request) -> web.StreamResponse:
            asked = orjson.loads(await http.read() or b"{}")
            id_ = asked.get("previous_response_id") or http.path.split("/")[3]
            if kept.get(id_) != number:
                return web.json_response({"error": {"message": "unknown"}}, status=404)
            return web.json_response({"by": number})

        return handle

    for number, upstream in enumerate(several.upstreams):
        upstream.handler = keeping(number)
    for id_, number in kept.items():
        goes_on = {"model": "m", "input": unheard(), "previous_response_id": id_}
        async with several.front.session.post("/v1/responses", json=goes_on) as reply:
            assert (reply.status, await reply.json()) == (200, {"by": number})
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
            path = f"/v1/responses/{id_}{path}"
            async with several.front.session.request(method, path) as reply:
                assert (reply.status, await reply.json()) == (200, {"by": number})
    async with several.front.session.get("/v1/responses/resp_none") as reply:
        assert reply.status == 404
        assert await reply.json() == {"error": {"message": "unknown"}}
    several.upstreams[0].handler = saying(503)
    async with several.front.session.get("/v1/responses/resp_a") as reply:
        # It may be there, though the others say that they don't keep it.
        assert reply.status == 503
    await several.upstreams[0].stop()
    for id_, status in (("resp_a", 503), ("resp_b", 200)):
        async with several.front.session.get(f"/v1/responses/{id_}") as reply:
            assert reply.status == status
    await several.upstreams[0].start()
    await until_all_up(several)


async def test_a_websocket_goes_where_its_session_is(several: Several) -> None:
    async def echo(http: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    headers = {"X-Session-Id": "of a socket"}
    home = await several.asked_for(question(model="m"), headers=headers)
    for upstream in several.upstreams:
        upstream.handler = echo
    before = several.counts()
    for _ in range(3):
        async with several.front.session.ws_connect("/v1/realtime", headers=headers) as socket:
            await socket.send_str("hi")
            assert await socket.receive_str() == "hi"
    before[home] += 3
    assert several.counts() == before


async def test_each_upstream_has_its_own_bound(several: Several) -> None:
    go = asyncio.Event()
    home = await several.asked_for(chat("Bound.", unheard(), model="one"))
    several.upstreams[home].handler = held(go)
    before = several.counts()
    slow = chat("Bound.", unheard(), model="one", stream=True)
    waiting = asyncio.create_task(several.front.ask(slow))
    async with asyncio.timeout(HANGS_S):
        while several.counts() == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    # The slow one holds itself up only.
    for _ in range(4):
        assert await several.asked_for(chat("Bound.", unheard(), model="one")) != home
    go.set()
    assert (await waiting)[0] == 200


async def test_metrics_tell_what_each_upstream_did(several: Several) -> None:
    counts = {"prompt_tokens": 1000, "completion_tokens": 1}
    counts["prompt_tokens_details"] = {"cached_tokens": 900}

    async def count(_: web.Request) -> web.StreamResponse:
        return web.json_response(body() | {"usage": counts})

    for upstream in several.upstreams:
        upstream.handler = count
    home = await several.asked_for(chat("Metrics.", unheard()))
    of = f'{{model="m",upstream="{several.upstreams[home].url}"}}'

    async def figures() -> list[float]:
        names = ("requests_total", "prompt_tokens_total", "cached_tokens_total", "inflight")
        return [await several.front.metric(f"tierserve_upstream_{name}{of}") for name in names]

    before = await figures()
    await several.asked_for(chat("Metrics.", unheard()))
    await several.asked_for(chat("Metrics.", unheard(), temperature=1))
    now = await figures()
    assert [b - a for a, b in zip(before, now, strict=True)] == [2, 2000, 1800, 0]


async def test_one_that_fails_again_and_again_is_left_out(several: Several) -> None:
    home = await several.asked_for(chat("Ejected.", unheard()))
    failing = several.upstreams[home]
    failing.handler = saying(503)
    before = len(failing.asked)
    up = f'tierserve_upstream_up{{model="m",upstream="{failing.url}"}}'
    async with asyncio.timeout(HANGS_S):
        while await several.front.metric(up) != 0:
            assert (await several.front.ask(chat("Ejected.", unheard())))[0] == 200
    assert len(failing.asked) - before >= FAILURES
    failing.handler = answer
    # A restart, which the probes of all models notice, brings it back at once.
    line = f"{failing.url} is not ready"
    logged = several.front.log.read_text().count(line)
    await failing.stop()
    await several.front.until_logged(line, logged + len(models_of(several.upstreams)))
    await failing.start()
    await until_all_up(several)
    assert await several.asked_for(chat("Ejected.", unheard())) == home


async def test_one_that_dies_moves_its_share_alone(several: Several) -> None:
    systems = [f"System {number}." for number in range(12)]
    homes = [await several.asked_for(chat(system, unheard())) for system in systems]
    dead = homes[0]
    await several.upstreams[dead].stop()
    try:
        for system, home in zip(systems, homes, strict=True):
            now = await several.asked_for(chat(system, unheard()))
            assert (now == home) == (home != dead)
    finally:
        await several.upstreams[dead].start()
        await until_all_up(several)
    assert [await several.asked_for(chat(system, unheard())) for system in systems] == homes


async def test_workers_agree(several: Several, tmp_path) -> None:
    async with Fleet(tmp_path, models_of(several.upstreams)) as fleet:
        await until_all_up(Several(fleet, several.upstreams))
        for system in map(str, range(6)):
            homes = {await several.asked_for(chat(system, unheard()))}
            for client in fleet.clients.values():
                before = several.counts()
                assert (await client.ask(chat(system, unheard())))[0] == 200
                homes.add(several.sent_since(before).index(1))
            assert len(homes) == 1
