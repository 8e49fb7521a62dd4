"""A configuration that changes while the server runs: each field that can, under load, in all
processes; one with a mistake changes nothing."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from server.config.load import load
from tests.server.config.test_changes import reloaded_fields
from tests.server.conftest import Front, Upstream, answer, body, counting, held, question
from tests.server.workers.fleet import ID_CHARACTERS
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG_S = 1_000_000
LAST_TTL_S = 1000
TIMESTAMP = "tierserve_config_last_reload_success_timestamp_seconds"
SUCCESSFUL = "tierserve_config_last_reload_successful"


def write(front: Front, changes: dict[str, Any]) -> bytes:
    """Change fields of the configuration by their paths; returns the file as it was."""
    before = front.config.read_bytes()
    sections = orjson.loads(before)
    for path, value in changes.items():
        *parents, name = path.split(".")
        holder = sections
        for each in parents:
            holder = holder.setdefault(each, {})
        holder[name] = value
    front.config.write_bytes(orjson.dumps(sections))
    return before


async def reload(front: Front) -> None:
    """Have the server read its files again; the master has, when this returns."""
    before = await front.metric(TIMESTAMP)
    front.process.send_signal(signal.SIGHUP)
    await front.until_above(TIMESTAMP, before)


@asynccontextmanager
async def configured(front: Front, **changes: Any) -> AsyncIterator[None]:
    before = write(front, {path.replace("__", "."): value for path, value in changes.items()})
    await reload(front)
    try:
        yield
    finally:
        front.config.write_bytes(before)
        await reload(front)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    models = {"m": {"upstreams": [_upstream.url], "vllm": {}}}
    sections = {"cache": {"ttl_s": LONG_S, "rules": []}}
    async with Front(tmp_path_factory.mktemp("served"), models, sections=sections) as made:
        yield made


async def ttl_of(front: Front, **more: Any) -> int:
    """Return how long the answer to a new question is fresh."""
    asked = question(**more)
    await front.ask_alone(asked)
    return int(re.search(r"ttl=(-?\d+)", (await front.ask_alone(asked))[1])[1])


async def is_kept(front: Front, **more: Any) -> bool:
    asked = question(**more)
    await front.ask_alone(asked)
    return "; hit" in (await front.ask_alone(asked))[1]


async def tier(front: Front, name: str) -> dict:
    connector = aiohttp.UnixConnector(str(front.socket))
    async with (
        aiohttp.ClientSession("http://admin", connector=connector) as session,
        session.get("/stats") as reply,
    ):
        return next(each for each in (await reply.json())["tiers"] if each["tier"] == name)


async def ttl(front: Front, _: Upstream) -> None:
    async with configured(front, cache__ttl_s=1000):
        assert 0 < await ttl_of(front) <= 1000
    assert await ttl_of(front) > 1000


async def rules(front: Front, _: Upstream) -> None:
    async with configured(front, cache__rules=[{"route": "/v1/chat/*", "ttl_s": 1000}]):
        assert 0 < await ttl_of(front) <= 1000


async def jitter(front: Front, _: Upstream) -> None:
    assert min([await ttl_of(front) for _ in range(6)]) < 0.999 * LONG_S
    async with configured(front, cache__ttl_jitter=0):
        assert min([await ttl_of(front) for _ in range(6)]) > 0.999 * LONG_S


async def revalidation(front: Front, _: Upstream) -> None:
    async with configured(front, cache__ttl_s=1e-6, cache__stale_while_revalidate_s=3600):
        assert await ttl_of(front) < 0


async def errors(front: Front, upstream: Upstream) -> None:
    async with configured(front, cache__ttl_s=1e-6, cache__stale_if_error_s=3600):
        asked = question()
        # Once for an answer, and once more, after which it is stored.
        for _ in range(2):
            await front.ask_alone(asked)

        async def fail(_: web.Request) -> web.Response:
            return web.Response(status=500)

        upstream.handler = fail
        status, how, _ = await front.ask_alone(asked)
        assert status == 200
        assert "ttl=-" in how


async def nondeterministic(front: Front, _: Upstream) -> None:
    assert not await is_kept(front, temperature=1)
    async with configured(front, cache__nondeterministic="always"):
        assert await is_kept(front, temperature=1)


async def variants(front: Front, upstream: Upstream) -> None:
    upstream.handler, asked = counting(), question(temperature=1)

    async def texts() -> list[bytes]:
        return [
            orjson.loads((await front.ask_alone(asked))[2])["choices"][0]["message"]["content"]
            for _ in range(6)
        ]

    async with configured(front, cache__nondeterministic="always"):
        # Until it is answered without being parsed.
        assert len({*await texts()}) == 1
        async with configured(front, cache__nondeterministic="always", cache__variants=2):
            assert len({*await texts()}) == 2
        async with configured(front, cache__nondeterministic="never"):
            assert len({*await texts()}) == 6


async def obedience(front: Front, upstream: Upstream) -> None:
    async def forbid(_: web.Request) -> web.Response:
        return web.json_response(body(), headers={"Cache-Control": "no-store"})

    upstream.handler = forbid
    assert not await is_kept(front)
    async with configured(front, cache__obey_upstreams=False):
        assert await is_kept(front)


async def upstreams(front: Front, upstream: Upstream) -> None:
    upstream.handler = held(go := asyncio.Event())
    async with (
        Upstream() as other,
        front.post(question(stream=True)) as begun,
        configured(front, models__m__upstreams=[other.url]),
    ):
        assert (await front.ask(question()))[0] == 200
        assert len(other.asked) == 1
        go.set()
        assert (await begun.read()).endswith(b"data: [DONE]\n\n")
    upstream.handler = answer
    assert (await front.ask(question()))[0] == 200


async def max_requests(front: Front, upstream: Upstream) -> None:
    upstream.handler = held(go := asyncio.Event())
    async with (
        front.post(question(stream=True)) as begun,
        configured(front, models__m__max_requests=1),
    ):
        async with front.post(question()) as refused:
            assert refused.status == 503
            assert "as many requests as it takes" in await refused.text()
        go.set()
        await begun.read()


async def timeout(front: Front, upstream: Upstream) -> None:
    upstream.handler = held(asyncio.Event())
    async with configured(front, models__m__timeout_s=0.1), front.post(question()) as failed:
        assert failed.status in (502, 504)
        await failed.read()


async def size_of_memory(front: Front, upstream: Upstream) -> None:
    async def long(_: web.Request) -> web.Response:
        return web.json_response(body("long " * 2000))

    upstream.handler = long
    for _ in range(20):
        await front.ask(question())
    async with configured(front, tiers__memory={"max_bytes": "64KiB"}):
        async with asyncio.timeout(HANGS_S):
            while (await tier(front, "memory"))["bytes"] > 64 * 1024:
                pass
        assert (await tier(front, "memory"))["max_bytes"] == 64 * 1024


async def size_of_disk(front: Front, _: Upstream) -> None:
    async with configured(front, tiers__disk__max_bytes="8MiB"):
        assert (await tier(front, "disk"))["max_bytes"] == 8 * 1024**2
        async with asyncio.timeout(HANGS_S):
            while (await tier(front, "disk"))["file"]["map_bytes"] < 8 * 1024**2:
                pass


async def waits(front: Front, upstream: Upstream) -> None:
    folder = front.config.parent
    models = {"m": {"upstreams": [upstream.url], "vllm": {}}}
    (folder / "other").mkdir()
    upstream.handler, asked = held(go := asyncio.Event()), question()
    disk = {"path": str(folder / "disk"), "max_bytes": "4MiB"}
    async with Front(folder / "other", models, disk=disk) as other:
        async with other.post(asked | {"stream": True}) as begun:
            upstream.handler = answer
            async with configured(front, cache__wait_for_others_s=0):
                assert (await front.ask(asked))[0] == 200
            assert await front.metric("tierserve_flight_waits_total") == 0
            # Now it begins to wait.
            waiting = asyncio.create_task(front.ask(asked, headers={"Cache-Control": "max-age=0"}))
            await front.until_above("tierserve_flights_waiting", 0)
            go.set()
            await begun.read()
        assert (await waiting)[0] == 200


async def level(front: Front, _: Upstream) -> None:
    async with configured(front, log__level="error"):
        await front.ask(question(), headers={"X-Request-Id": "quiet"})
    await front.ask(question(), headers={"X-Request-Id": "loud"})
    await front.until_logged("loud")
    assert "quiet" not in front.log.read_text()


Effect = Callable[[Front, Upstream], Awaitable[None]]
EFFECTS: dict[str, Effect] = {
    "cache.nondeterministic": nondeterministic,
    "cache.obey_upstreams": obedience,
    "cache.rules": rules,
    "cache.stale_if_error_s": errors,
    "cache.stale_while_revalidate_s": revalidation,
    "cache.ttl_jitter": jitter,
    "cache.ttl_s": ttl,
    "cache.variants": variants,
    "cache.wait_for_others_s": waits,
    "log.level": level,
    "models.m.max_requests": max_requests,
    "models.m.timeout_s": timeout,
    "models.m.upstreams": upstreams,
    "tiers.disk.max_bytes": size_of_disk,
    "tiers.memory.max_bytes": size_of_memory,
}


@pytest.mark.parametrize("path", EFFECTS)
async def test_takes_effect(served: Front, upstream: Upstream, path: str) -> None:
    await EFFECTS[path](served, upstream)


async def test_each_field_that_can_change_was_tried(served: Front) -> None:
    assert reloaded_fields(load(served.config)) == {*EFFECTS}


async def ask_all(front: Front, known: dict, stop: asyncio.Event) -> tuple[int, list[str]]:
    """Send hits, misses and streams until `stop`; returns how many, and what was wrong."""
    number, wrong = 0, []
    async with aiohttp.ClientSession(front.url) as session:
        while not stop.is_set():
            asked = (known, question(), question(stream=True))[number % 3]
            number += 1
            try:
                async with session.post("/v1/chat/completions", json=asked) as reply:
                    read = await reply.read()
                is_whole = not asked.get("stream") or read.endswith(b"data: [DONE]\n\n")
                if reply.status != 200 or not is_whole:
                    wrong.append(f"{reply.status} {read!r}")
            except aiohttp.ClientError as exc:
                wrong.append(repr(exc))
    return number, wrong


@pytest.mark.parametrize("workers", [1, 2])
async def test_under_load_nothing_is_lost_and_all_processes_agree(
    upstream: Upstream, tmp_path: Path, workers: int
) -> None:
    models = {"m": {"upstreams": [upstream.url], "vllm": {}}}
    sections = {"cache": {"ttl_s": LONG_S, "rules": []}, "server": {"workers": workers}}
    async with Upstream() as other, Front(tmp_path, models, sections=sections) as front:
        await front.ask(known := question())
        stop = asyncio.Event()
        clients = [asyncio.create_task(ask_all(front, known, stop)) for _ in range(8)]
        # All of them leave twice, for one that has yet to be probed.
        upstreams = [other.url], [upstream.url, other.url], [upstream.url], [other.url]
        for number, urls in enumerate(upstreams):
            write(
                front,
                {
                    "cache.ttl_s": LAST_TTL_S * 2 ** (len(upstreams) - number - 1),
                    "models.m.upstreams": urls,
                    "models.m.max_requests": 100 + number,
                    "tiers.memory": {"max_bytes": 1024**2 * (8 - number)},
                    "tiers.disk.max_bytes": 1024**2 * (6, 2, 4, 5)[number],
                    "server.port": front.port + 1 + number,
                },
            )
            await reload(front)
            right = front.config.read_bytes()
            unknown = "cache.ttl: unknown key; did you mean ttl_s?"
            for wrong, mistake in (
                (
                    right.replace(b'"ttl_s"', b'"ttl"'),
                    f"can't be used, and changes nothing: {unknown}",
                ),
                (b"# Somebody begins to write.\n", "should not be empty"),
            ):
                # By itself it may have read the one before twice.
                times = front.log.read_text().count(mistake)
                front.config.write_bytes(wrong)
                front.process.send_signal(signal.SIGHUP)
                await front.until_logged(mistake, times + 1)
            assert await front.metric(SUCCESSFUL) == 0
            front.config.write_bytes(right)
            await reload(front)
            assert await front.metric(SUCCESSFUL) == 1
            await front.until_logged("server.port: changes at the next start")
        stop.set()
        for count, wrong in await asyncio.gather(*clients):
            assert count > 0
            assert wrong == []
        assert other.asked
        await until_all_answer(front, workers, LAST_TTL_S)
        for name in ("memory", "disk"):
            assert (await tier(front, name))["max_bytes"] == 5 * 1024**2
        if workers == 2:
            # One that takes the place of another begins as the others are now.
            (one, _) = children = psutil.Process(front.process.pid).children()
            one.kill()
            await front.until_logged("another takes its place")
            async with asyncio.timeout(HANGS_S):
                while len(psutil.Process(front.process.pid).children()) < len(children):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await until_all_answer(front, workers, LAST_TTL_S)


async def until_all_answer(front: Front, workers: int, ttl_s: int) -> None:
    """Wait until each worker gives new answers this ttl."""
    right: set[str] = set()
    async with asyncio.timeout(HANGS_S):
        while len(right) < workers:
            connector = aiohttp.TCPConnector(force_close=True)
            async with aiohttp.ClientSession(front.url, connector=connector) as session:
                asked = question()
                async with session.post("/v1/chat/completions", json=asked) as reply:
                    worker = reply.headers["X-Request-Id"][:ID_CHARACTERS]
                    await reply.read()
                async with session.post("/v1/chat/completions", json=asked) as reply:
                    found = re.search(r"hit; ttl=(\d+)", reply.headers["Cache-Status"])
                    await reply.read()
            if found is not None and int(found[1]) <= ttl_s:
                right.add(worker)
