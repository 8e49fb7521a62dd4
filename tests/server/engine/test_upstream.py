"""Upstreams whose connections end at bad moments, which count as ready, and which go on."""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace

import pytest
from aiohttp import web

from server.engine.routing.connections import CONNECT_TIMEOUT_S
from server.engine.upstream import Upstream as Asked
from tests.server.conftest import CHAT, Front, Upstream, answer, question, running
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def once_each(reached: list[str]) -> Handler:
    """Return a handler that answers one request of each connection, and closes on the next."""
    seen: set[object] = set()

    async def handle(http: web.Request) -> web.StreamResponse:
        transport = http.transport
        assert transport is not None
        if transport in seen:
            reached.append(http.path)
            transport.close()
            return web.Response()
        seen.add(transport)
        if http.headers.get("Upgrade") == "websocket":
            socket = web.WebSocketResponse()
            await socket.prepare(http)
            return socket
        return await answer(http) if http.method == "POST" else web.Response(text="yes")

    return handle


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"temperature": 1}])
async def test_an_answer_is_asked_for_again_where_a_connection_was_closed(
    front: Front, upstream: Upstream, more: dict
) -> None:
    reached: list[str] = []
    upstream.handler = once_each(reached)
    # A connection that has idled for long isn't used again, and one that is closed late may have
    # brought the request.
    is_soon = False
    async with asyncio.timeout(HANGS_S):
        while not (reached and is_soon):
            reached.clear()
            began = time.monotonic()
            status, _, text = await front.ask(question(**more))
            is_soon = time.monotonic() - began < CONNECT_TIMEOUT_S
            assert (status, b"yes" in text) == (200, True) or not is_soon
    assert reached == [CHAT]


async def test_what_may_not_be_sent_twice_has_a_connection_of_its_own(
    front: Front, upstream: Upstream
) -> None:
    reached: list[str] = []
    upstream.handler = once_each(reached)
    await front.ask(question())
    search = {"input": "hi", "tools": [{"type": "web_search"}]}
    background = {"input": "hi", "background": True}
    for _ in range(2):
        for path, asked in (
            ("/v1/others", {}),
            ("/v1/responses", search),
            ("/v1/responses", background),
        ):
            async with front.session.post(path, json=asked) as response:
                assert response.status == 200
        async with front.session.ws_connect("/v1/realtime") as socket:
            await socket.receive()
    assert reached == []
    async with front.session.get("/v1/others") as response:
        assert await response.text() == "yes"


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nA: b\r\n"])
async def test_what_an_upstream_has_begun_to_answer_is_not_sent_again(
    front: Front, upstream: Upstream, sent: bytes
) -> None:
    async def cut(http: web.Request) -> web.StreamResponse:
        assert http.transport is not None
        http.transport.write(sent)
        http.transport.close()
        return web.Response()

    async with asyncio.timeout(HANGS_S):
        while True:
            upstream.handler = answer
            await front.ask(question())
            upstream.asked.clear()
            upstream.handler = cut
            assert (await front.ask(question()))[0] == 502
            # The first may have been sent on a connection that was closed already, unless that had
            # idled for long.
            if sent or len(upstream.asked) == 2:
                break
    assert len(upstream.asked) == (1 if sent else 2)


async def test_whatever_answers_is_ready(tmp_path) -> None:
    async with Upstream() as unlisted, Upstream() as refusing, Upstream() as busy:
        upstreams = {404: unlisted, 405: refusing, 429: busy}
        models = {}
        for status, each in upstreams.items():
            each.lists = partial(with_status, status)
            models[str(status)] = {"upstreams": [each.url]}
        async with Front(tmp_path, models) as front:
            for status, each in upstreams.items():
                assert (await front.ask(question(model=str(status))))[0] == 200
                line = f"{each.url} is ready: GET /v1/models has status {status}"
                await front.until_logged(line)


async def with_status(status: int, _: web.Request) -> web.StreamResponse:
    return web.Response(status=status)


async def test_what_is_not_ready_says_why_once(own_upstream: Upstream, tmp_path) -> None:
    looked = 0

    async def fails(_: web.Request) -> web.StreamResponse:
        nonlocal looked
        looked += 1
        return web.Response(status=502)

    async with running(tmp_path, own_upstream) as front:
        # A connection that stays open shows nothing.
        assert (await front.ask(question()))[0] == 200
        for site in list(own_upstream._runner.sites):
            await site.stop()
        await front.until_ready(503)
        await front.until_logged(f"{own_upstream.url} is not ready: it takes no connection")
        await own_upstream.stop()
        own_upstream.lists = fails
        await own_upstream.start()
        line = f"{own_upstream.url} is not ready: GET /v1/models has status 502"
        # Of four models, which have looked three times each.
        async with asyncio.timeout(HANGS_S):
            while looked < 12 or front.log.read_text().count(line) < 4:
                await front.ready()
        assert front.log.read_text().count(line) == 4


async def test_who_answers_requests_may_take_its_time_to_list_models(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_up = asyncio.Event()

    async def never(_: web.Request) -> web.StreamResponse:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()
        raise AssertionError

    async def empty(_: web.Request) -> web.StreamResponse:
        return web.Response()

    async def ask() -> None:
        while True:
            (await asked.request("GET", "/x", None, {}, repeatable=True)).release()

    monkeypatch.setattr("server.engine.routing.connections.PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(upstream, "lists", never)
    upstream.handler = empty
    asked = Asked(upstream.url, timeout_s=60)
    with caplog.at_level(logging.INFO):
        watching = asyncio.create_task(asked.watch())
        await asyncio.wait_for(given_up.wait(), HANGS_S)
        given_up.clear()
        await asyncio.wait_for(given_up.wait(), HANGS_S)
        assert not asked.ready
        assert caplog.text.count("is not ready: GET /v1/models has no answer after") == 1
        asking = asyncio.create_task(ask())
        await asyncio.wait_for(asked.ready_event.wait(), HANGS_S)
    for task in (watching, asking):
        task.cancel()
    await asyncio.gather(watching, asking, return_exceptions=True)
    await asked.close()


@pytest.mark.parametrize(
    ("events", "keeps"),
    [
        ("", True),
        ("probed", True),
        ("unreachable probed", False),
        ("stopped", False),
        ("stopped probed", False),
        ("stopped started probed", False),
    ],
)
async def test_an_engine_of_ours_is_not_asked_whether_it_goes_on(
    tmp_path, monkeypatch: pytest.MonkeyPatch, events: str, keeps: bool
) -> None:
    now_s = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(now_s))
    monkeypatch.setattr("server.engine.upstream.time", clock)
    # Nobody listens there.
    asked = Asked("http://engine", timeout_s=60, socket=str(tmp_path / "engine.sock"))
    happen = {
        "probed": lambda: asked._set_state(True, False, ""),
        "started": asked.mark_started,
        "stopped": asked.mark_stopped,
        "unreachable": lambda: asked.mark_unreachable(OSError()),
    }
    asked.ready = True
    since = next(now_s)
    for event in events.split():
        happen[event]()
    assert asked.ready is ("stopped" not in events or "started" in events)
    assert await asked.keeps_generating(since=since, model="m", headers={}) is keeps
    await asked.close()


async def test_one_that_took_no_connection_is_probed_soon(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.upstream._PROBE_EVERY_UP_S", 3600)
    monkeypatch.setattr("server.engine.upstream._PROBE_EVERY_DOWN_S", 0.01)
    asked = Asked(upstream.url, timeout_s=60)
    watching = asyncio.create_task(asked.watch())
    for _ in range(3):
        await asyncio.wait_for(asked.ready_event.wait(), HANGS_S)
        asked.mark_unreachable(ConnectionRefusedError())
        assert not asked.ready
    watching.cancel()
    await asked.close()
