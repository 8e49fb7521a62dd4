"""The state of the cache: what runs find of each other's, and what they leave."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import orjson
import pytest
import pytest_asyncio

from server.bench.cache_state import (
    MODES,
    Admin,
    CacheState,
    Mode,
    Warmed,
    clean,
    is_tierserve,
    local_admin,
    new_run,
    prepare,
)
from server.bench.load import Target
from server.bench.workload import Step
from server.bench.workloads import Common, build
from server.config.base import ConfigError
from server.config.secrets import hash_key
from tests.server.conftest import Front, Upstream, running
from tests.servers import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMMON = Common("m", stream=False)
ADMIN_PORT, KEY = free_port(), "a key of the admin port"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(tmp_path_factory) -> AsyncIterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    sections = {"admin": {"port": ADMIN_PORT, "key": hash_key(KEY)}}
    async with Upstream() as upstream, running(folder, upstream, sections=sections) as made:
        yield made


async def outcomes(front: Front, mode: Mode, numbers: range, spec: str = "zipf:unique=1") -> list:
    """Return the outcomes of sessions of a run that has just begun."""
    state = CacheState(mode, new_run(), tags=True)
    workload = build(spec, state.common(COMMON))

    async def send(step: Step) -> bool:
        return await ask(front, step) != "failed"

    warmed = await prepare(
        state, workload, send, requests=10, concurrency=3, on_progress=lambda _: None
    )
    assert warmed.failed == 0
    found = [await ask(front, workload.session(number).steps[0]) for number in numbers]
    assert await clean(state, Admin(str(front.socket))) is None
    return found


async def ask(front: Front, step: Step) -> str:
    """Return the outcome, once no answer under way is joined, which may not be stored yet."""
    _, status, _ = await front.ask_alone(orjson.loads(step.body))
    return "hit" if "hit" in status else "miss" if "miss" in status else "failed"


async def test_cold_runs_find_nothing_of_each_other(front: Front) -> None:
    for _ in range(2):
        assert await outcomes(front, "cold", range(5)) == ["miss"] * 5
    spec = "zipf:prompts=1"
    for _ in range(2):
        assert await outcomes(front, "cold", range(3), spec) == ["miss", "hit", "hit"]


async def test_warm_runs_find_what_repeats(front: Front) -> None:
    for _ in range(2):
        assert await outcomes(front, "warm", range(5), "zipf:prompts=5") == ["hit"] * 5
    half = await outcomes(front, "warm", range(30), "zipf:prompts=5,unique=0.5")
    assert set(half) == {"hit", "miss"}


async def test_steady_runs_find_what_was_there(front: Front) -> None:
    assert await outcomes(front, "steady", range(5)) == ["miss"] * 5
    assert await outcomes(front, "steady", range(5)) == ["hit"] * 5


async def test_requests_with_a_tag_are_known(front: Front) -> None:
    state = CacheState("cold", new_run(), tags=True)
    (step,) = build("zipf", state.common(COMMON)).session(0).steps
    # One whose bytes arrive in two pieces isn't known by them, so we don't leave that to aiohttp.
    head = f"POST {step.path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(step.body)}\r\n\r\n".encode() + step.body
    assert [await ask(front, step) for _ in range(2)] == ["miss", "hit"]
    known = await front.metric("tierserve_known_requests_total")
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(front.url).port)
    try:
        for _ in range(100):
            # Its body is learned by a hit, and then its bytes, once they came twice.
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", answer)
            assert length is not None, answer
            await reader.readexactly(int(length[1]))
            if await front.metric("tierserve_known_requests_total") > known:
                break
        else:
            pytest.fail("a request with a tag isn't known")
    finally:
        writer.close()
        await writer.wait_closed()


async def test_an_admin_port_wants_its_key(front: Front) -> None:
    state = CacheState("cold", new_run(), tags=True)
    url = f"http://127.0.0.1:{ADMIN_PORT}"
    assert await is_tierserve(Target(front.url + "/"))
    assert await clean(state, Admin(url + "/", KEY)) is None
    warning = await clean(state, Admin(url, "another"))
    assert warning is not None
    assert f"as {url} answers with status 401; tierserve cache purge --tag {state.tag}" in warning


async def test_what_can_not_be_removed_is_told() -> None:
    state = CacheState("cold", "r", tags=True)
    assert state.tag == "bench-r"
    unknown, gone, wrong = [
        await clean(state, admin)
        for admin in (None, Admin("/nowhere/a.sock"), Admin("http://127.0.0.1:1"))
    ]
    assert unknown == (
        "the entries of this run stay in the cache until they expire, as the endpoint's admin API "
        "isn't known (--admin); tierserve cache purge --tag bench-r removes them"
    )
    assert gone is not None
    assert wrong is not None
    assert "/nowhere/a.sock doesn't answer" in gone
    assert "http://127.0.0.1:1 doesn't answer" in wrong
    for nothing in (CacheState("steady", "r", tags=True), CacheState("cold", "r", tags=False)):
        assert nothing.tag == ""
        assert await clean(nothing, None) is None


async def test_others_are_no_tierserve() -> None:
    async with Upstream() as upstream:
        assert not await is_tierserve(Target(upstream.url))
    assert not await is_tierserve(Target(upstream.url))
    assert not await is_tierserve(Target("http://a b"))


async def test_the_socket_of_a_server_of_this_user_is_known(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_admin(Target("http://127.0.0.1:8000")) is None
    (tmp_path / "tierserve").mkdir()
    for port in (8000, 80):
        path = tmp_path / "tierserve" / f"admin-{port}.sock"
        server = await asyncio.start_unix_server(lambda *_: None, path)
        found = [Admin(str(path))]
        hosts = ("127.0.0.1", "localhost", "[::1]")
        urls = [f"http://{host}:{port}" if port != 80 else f"http://{host}" for host in hosts]
        assert [local_admin(Target(url)) for url in urls] == found * 3
        assert local_admin(Target(f"http://10.0.0.1:{port}")) is None
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("mode", MODES)
async def test_probes_of_a_ramp_do_not_feed_each_other(mode: Mode) -> None:
    state = CacheState(mode, "r", tags=True)
    sent = [
        {
            workload.session(number).steps[0].body
            for workload in [build("zipf:unique=0.5", state.common(COMMON, probe))]
            for number in range(200)
        }
        for probe in range(3)
    ]
    warm = {step.body for step in build("zipf", state.common(COMMON)).repeated()}
    assert sent[0] & sent[1] == (set() if mode == "cold" else sent[0] & sent[1] & warm)
    assert sent[1] & sent[2] <= warm
    assert len({build("zipf", state.common(COMMON, probe)).digest() for probe in range(3)}) == 1


async def test_warming_is_bounded_and_counted() -> None:
    sent: list[Step] = []
    most = at_once = 0

    async def send(step: Step) -> bool:
        nonlocal most, at_once
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        sent.append(step)
        return len(sent) % 3 > 0

    state = CacheState("warm", "r", tags=False)
    workload = build("zipf:prompts=30", state.common(COMMON))

    async def warm(requests: int) -> Warmed:
        sent.clear()
        told: list[int] = []
        warmed = await prepare(
            state, workload, send, requests=requests, concurrency=4, on_progress=told.append
        )
        assert told == [*range(1, len(sent) + 1)]
        return warmed

    assert await warm(7) == Warmed(7, 2, complete=False)
    assert most == 4
    assert {*sent} == {*list(workload.repeated())[:7]}
    assert await warm(30) == await warm(100) == Warmed(30, 10, complete=True)


async def test_an_endpoint_that_answers_nothing_is_not_asked_for_all() -> None:
    async def send(_: Step) -> bool:
        return False

    state = CacheState("warm", "r", tags=False)
    workload = build("zipf", state.common(COMMON))
    warmed = await prepare(
        state, workload, send, requests=1000, concurrency=1, on_progress=lambda _: None
    )
    assert warmed == Warmed(20, 20, complete=False)


async def test_a_file_that_changes_while_it_is_warmed_is_a_mistake(tmp_path: Path) -> None:
    async def send(_: Step) -> bool:
        return True

    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n')
    workload = build(str(file), COMMON)
    file.write_text("")
    with pytest.raises(ConfigError, match="should stay as it is"):
        await prepare(
            CacheState("warm", "r", tags=False), workload, send,
            requests=5, concurrency=2, on_progress=lambda _: None,
        )  # fmt: skip
