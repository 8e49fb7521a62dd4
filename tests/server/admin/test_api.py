"""The admin API at its edge: the socket of a real server."""

import asyncio
import contextlib
import io
import os
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from server.admin import export_format
from server.config.base import ConfigError
from server.config.folders import cache_folder
from server.config.load import load
from tests.server.admin.test_exports import entry, export, streamed
from tests.server.conftest import (
    CHAT,
    WHOLE,
    Front,
    Upstream,
    alike,
    answer,
    body,
    chunk,
    free_port,
    question,
    running,
    stream,
)  # fmt: skip
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


def connect(path: Path) -> aiohttp.ClientSession:
    return aiohttp.ClientSession("http://admin", connector=aiohttp.UnixConnector(str(path)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def admin(front: Front) -> AsyncIterator[aiohttp.ClientSession]:
    async with connect(front.socket) as session:
        yield session


async def get(admin: aiohttp.ClientSession, path: str, **given) -> dict:
    async with admin.get(path, params=given) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        return await response.json()


async def key_of(admin: aiohttp.ClientSession, front: Front, **more) -> str:
    """Have an answer stored in both tiers; return its key."""
    asked = question(**more)
    key = front.key(asked)
    await front.ask(asked)
    # An answer is given before it is on disk.
    async with asyncio.timeout(HANGS_S):
        while not [row for row in await rows_of(admin, key) if len(row["tiers"]) == 2]:
            pass
    return key


async def asked_of(admin: aiohttp.ClientSession) -> list[tuple[int, int]]:
    return [(tier["hits"], tier["misses"]) for tier in (await get(admin, "/stats"))["tiers"]]


async def rows_of(admin: aiohttp.ClientSession, key: str) -> list[dict]:
    return (await get(admin, "/entries", prefix=key))["entries"]


async def test_the_socket_is_this_user_s_alone(front: Front, admin) -> None:
    assert stat.S_IMODE(front.socket.stat().st_mode) == 0o600
    assert (await get(admin, "/stats"))["tiers"][0]["tier"] == "memory"


async def test_nothing_of_it_is_on_the_public_port(front: Front, upstream: Upstream) -> None:
    for method, path in (("GET", "/stats"), ("GET", "/entries"), ("POST", "/purge")):
        async with front.session.request(method, path, json={"all": True}) as response:
            # It is the engine's to answer, as any other path.
            assert await response.json() == body()
        assert upstream.asked[-1].path == path


async def test_looking_counts_as_no_question(front: Front, admin) -> None:
    key = await key_of(admin, front)
    before = await asked_of(admin)
    rows = await rows_of(admin, key)
    entry = await get(admin, f"/entries/{key}")
    assert await asked_of(admin) == before
    assert rows[0]["tiers"] == entry["tiers"] == ["memory", "disk"]
    assert entry["frequency"] == 1
    assert entry["state"] == "fresh"
    assert entry["stored_at"] + entry["age_s"] == pytest.approx(
        entry["expires_at"] - entry["ttl_s"]
    )


async def test_an_entry_has_the_content_that_clients_get(front: Front, admin) -> None:
    shown = await get(admin, f"/entries/{await key_of(admin, front)}")
    assert shown["form"] == "body"
    assert orjson.loads(shown["content"]) == body() | {"id": "", "created": 0}
    shown = await get(admin, f"/entries/{await key_of(admin, front, stream=True)}")
    assert shown["form"] == "events"
    plain = b"".join(WHOLE[:3]) + WHOLE[4]
    plain = plain.replace(b'"chatcmpl-x"', b'""').replace(b'"created":1', b'"created":0')
    assert shown["content"] == plain.decode()


@pytest.mark.parametrize("streams", [False, True])
async def test_a_large_answer_is_shown_whole(front: Front, admin, upstream, streams: bool) -> None:
    text = 'é\n"\U0001f600' * 15_000

    async def large(http: web.Request) -> web.StreamResponse:
        if not streams:
            return web.json_response(body(text))
        return await stream(http, WHOLE[0], chunk({"content": text}), *WHOLE[2:])

    upstream.handler = large
    key = await key_of(admin, front, stream=streams)
    upstream.handler = answer
    shown = await get(admin, f"/entries/{key}")
    assert shown["key"] == key
    if not streams:
        assert orjson.loads(shown["content"]) == body(text) | {"id": "", "created": 0}
    else:
        (_, event, *_) = shown["content"].split("\n\n")
        assert orjson.loads(event[6:])["choices"][0]["delta"]["content"] == text
    async with admin.get("/export") as response:
        line = next(line for line in (await response.read()).splitlines() if key.encode() in line)
    async with admin.delete(f"/entries/{key}") as response:
        assert response.status == 204
    assert len(export_format.decode_line(line).entry.answer.content) > len(text.encode())


async def paged(admin: aiohttp.ClientSession, tier: str) -> list[str]:
    found, after = [], ""
    while after is not None:
        given = {"tier": tier, "limit": 3, "after": after}
        page = await get(admin, "/entries", **{n: v for n, v in given.items() if v})
        assert len(page["entries"]) <= 3
        found += [row["key"] for row in page["entries"]]
        after = page["after"]
    return found


async def test_pages_tell_of_each_entry_once(front: Front, admin) -> None:
    keys = {await key_of(admin, front) for _ in range(7)}
    for tier in ("", "memory", "disk"):
        async with asyncio.timeout(HANGS_S):
            # What waits for its commit has no place in the order yet.
            while not keys <= set(found := await paged(admin, tier)):
                pass
        assert len(found) == len(set(found))


async def test_what_is_asked_for_most_comes_first(front: Front, admin) -> None:
    asked = question()
    for _ in range(9):
        await front.ask_alone(asked)
    for given in ({}, {"tier": "memory"}):
        counts = [row["frequency"] for row in (await get(admin, "/entries", **given))["entries"]]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] >= 9


async def test_a_purged_entry_is_gone_everywhere(front: Front, admin, upstream: Upstream) -> None:
    asked = question()
    await key_of(admin, front, **asked)
    key = await key_of(admin, front)
    async with admin.delete(f"/entries/{key}") as response:
        assert response.status == 204
    async with admin.get(f"/entries/{key}") as response:
        assert response.status == 404
    assert await rows_of(admin, key) == []
    assert "hit" in (await front.ask(asked))[1]
    async with admin.post("/purge", json={"all": True}) as response:
        assert await response.json() == {"purged": ["all"]}
    assert (await get(admin, "/entries"))["entries"] == []
    assert "fwd=miss" in (await front.ask_alone(asked))[1]
    assert len(upstream.asked) == 3


async def test_many_keys_are_purged_at_once_or_none(front: Front, admin) -> None:
    keys = [await key_of(admin, front) for _ in range(2)]
    others = [f"{n:064x}" for n in range(998)]
    async with admin.post("/purge", json={"key": [*keys, *others, "1"]}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, "key")
        assert "from 1 to 1000 names at once, not 1001; nothing was purged" in error["message"]
    assert len([*await rows_of(admin, keys[0]), *await rows_of(admin, keys[1])]) == 2
    async with admin.post("/purge", json={"key": [*keys, *others]}) as response:
        assert await response.json() == {"purged": [f"key:{key}" for key in (*keys, *others)]}
    assert [*await rows_of(admin, keys[0]), *await rows_of(admin, keys[1])] == []


async def test_an_export_is_imported_after_a_purge_only_as_purged(front: Front, admin) -> None:
    key = await key_of(admin, front)
    async with admin.get("/export") as response:
        assert response.headers["Content-Type"] == "application/jsonl"
        lines = await response.read()
    held = len(lines.splitlines()) - 2
    async with admin.post("/import", data=lines) as response:
        result = await response.json()
    assert result == dict.fromkeys(result, 0) | {"unchanged": held, "problems": []}
    async with admin.post("/purge", json={"key": [key]}) as response:
        assert response.status == 200
    async with admin.post("/import", data=lines) as response:
        result = await response.json()
    assert (result["unchanged"], result["purged"]) == (held - 1, 1)


async def test_a_file_in_use_is_verified_and_not_compacted(front: Front, admin) -> None:
    await key_of(admin, front)
    async with admin.post("/verify") as response:
        result = await response.json()
    assert result["entries"] >= 1
    assert (result["damaged"], result["problem"]) == (0, None)
    async with admin.post("/compact") as response:
        assert response.status == 409
        assert "Stop the server first" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "message"),
    [
        ("GET", "/", {}, 404, "There is no such path; there are /stats"),
        ("GET", CHAT, {}, 404, "There is no such path"),
        ("POST", "/stats", {}, 405, "The method should be GET"),
        ("GET", "/entries", {"params": {"limit": "0"}}, 400, "limit should be from 1 to 1000"),
        ("GET", "/entries", {"params": {"limit": "1001"}}, 400, "limit should be"),
        ("GET", "/entries", {"params": {"limit": "²"}}, 400, "limit should be"),
        ("GET", "/entries", {"params": {"size": "1"}}, 400, "There are only tier, prefix"),
        ("GET", "/entries", {"params": {"tier": "x"}}, 400, "one of memory, disk"),
        ("GET", "/entries", {"params": {"after": "x:"}}, 400, "after should be"),
        ("GET", "/entries", {"params": {"after": "disk:x"}}, 400, "after should be"),
        ("GET", "/entries", {"params": {"after": "memory:x:y"}}, 400, "after should be"),
        ("GET", "/entries", {"params": {"prefix": "k" * 512}}, 400, "prefix should have at most"),
        ("GET", "/entries/none", {}, 404, "There is no entry under this key."),
        ("GET", f"/entries/{'k' * 512}", {}, 400, "key should have at most 511 bytes"),
        ("DELETE", "/entries/none", {}, 404, "There is no entry under this key."),
        ("POST", "/purge", {}, 400, "an object with one of key, model, tenant, tag, all"),
        ("POST", "/purge", {"json": {"key": "k", "all": True}}, 400, "one of key, model"),
        ("POST", "/purge", {"json": {"keys": "k"}}, 400, "one of key, model"),
        ("POST", "/purge", {"json": {"all": False}}, 400, "all should be true"),
        ("POST", "/purge", {"json": {"key": []}}, 400, "key should be a text or a list"),
        ("POST", "/purge", {"json": {"key": "k"}}, 400, "key should be as `tierserve cache ls`"),
        ("POST", "/purge", {"json": {"tag": [1]}}, 400, "tag should be a text or a list"),
        ("POST", "/purge", {"data": io.BytesIO(bytes(2_000_000))}, 413, "larger"),
        ("POST", "/import", {"data": b"hello\n"}, 400, "should begin as an export of tierserve"),
    ],
)
async def test_what_is_asked_wrongly_is_named(
    admin, method, path, options, status, message
) -> None:
    async with admin.request(method, path, **options) as response:
        assert response.status == status
        error = (await response.json())["error"]
    assert message in error["message"]
    assert error["code"] == status


async def test_many_entries_are_listed_while_hits_are_answered(
    upstream: Upstream, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TIERSERVE__TIERS__DISK__MAX_BYTES", "64MiB")
    now = time.time()
    keys = {f"{number:064x}" for number in range(5000)}
    lines = export(*((key, entry("{}", now, 1e6)) for key in keys))
    async with running(tmp_path, upstream) as front, connect(front.socket) as admin:
        async with admin.post("/import", data=streamed(lines)) as response:
            result = await response.json()
        assert (result["stored"], result["problems"]) == (5000, [])
        asked = question()
        while "hit" not in (await front.ask(asked))[1]:
            pass
        found: list[str] = []

        async def list_all() -> None:
            after = ""
            while after is not None:
                page = await get(admin, "/entries", limit=1000, after=after)
                found.extend(row["key"] for row in page["entries"])
                after = page["after"]

        hits = 0
        listing = asyncio.create_task(list_all())
        while not listing.done():
            assert "hit" in (await front.ask(asked))[1]
            hits += 1
        await listing
        # At least one a page.
        assert hits > 5
        assert len(found) == len(set(found)) == 5001
        assert keys < set(found)


async def test_an_export_that_nobody_reads_ends(
    upstream: Upstream, tmp_path: Path, monkeypatch
) -> None:
    now = time.time()
    lines = export(*((f"{n:064x}", entry("x" * 9000, now, 1e6)) for n in range(200)))
    async with (
        running(tmp_path, upstream) as front,
        connect(front.socket) as admin,
        admin.post("/import", data=streamed(lines)) as response,
    ):
        assert (await response.json())["stored"] == 200
    monkeypatch.setenv("TIERSERVE__SERVER__CLIENT_TIMEOUT_S", "0.3")
    async with running(tmp_path, upstream) as front:
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(str(front.socket))
            idle.sendall(b"GET /export HTTP/1.1\r\nHost: admin\r\n\r\n")
            await front.until_logged("the client does not read")
            whole = await asyncio.to_thread(_rest, idle)
        assert b"tierserve-export" in whole
        assert b'{"entries":' not in whole


def _rest(connection: socket.socket) -> bytes:
    read = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            read += piece
    return read


async def test_the_socket_is_removed_replaced_and_never_taken(
    upstream: Upstream, tmp_path: Path
) -> None:
    async with running(tmp_path, upstream) as front:
        config = orjson.loads(front.config.read_bytes())
        config["server"]["port"] = free_port()
        config["tiers"]["disk"]["path"] = str(tmp_path / "other")
        second = tmp_path / "second.yaml"
        second.write_bytes(orjson.dumps(config))
        process = await asyncio.create_subprocess_exec(
            *front.command[:-1], str(second), stderr=asyncio.subprocess.PIPE
        )
        _, err = await process.communicate()
        assert process.returncode == 1
        assert f"admin.socket: another server answers at {front.socket}".encode() in err
        front.process.send_signal(signal.SIGKILL)
        await front.process.wait()
        assert front.socket.is_socket()
        await front.session.close()
        await front.start()
        async with connect(front.socket) as admin:
            assert (await get(admin, "/stats"))["tiers"]
        front.process.terminate()
        await front.process.wait()
        assert list(tmp_path.glob("admin.sock*")) == []


@pytest.mark.parametrize("made", ["file", "folder of a file"])
async def test_a_socket_that_can_t_be_made_is_named(
    upstream: Upstream, tmp_path: Path, made: str
) -> None:
    front = Front(tmp_path, alike(upstream.url))
    front.socket.write_text("mine")
    if made != "file":
        os.environ["TIERSERVE__ADMIN__SOCKET"] = str(front.socket / "admin.sock")
    try:
        process = await asyncio.create_subprocess_exec(
            *front.command, stderr=asyncio.subprocess.PIPE
        )
    finally:
        os.environ.pop("TIERSERVE__ADMIN__SOCKET", None)
    _, err = await process.communicate()
    assert process.returncode == 2
    assert b"admin.socket: should be a path where a socket can be made, or null" in err
    assert front.socket.read_text() == "mine"


async def test_where_the_socket_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    for text, expected in (
        ("server: {port: 7}", cache_folder() / "admin-7.sock"),
        ("admin: {socket: null}", None),
        ("admin: {socket: a.sock}", tmp_path / "a.sock"),
    ):
        file.write_text(text)
        assert load(file).admin.socket == expected
    file.write_text(f"admin: {{socket: /{'x' * 107}}}")
    with pytest.raises(ConfigError, match=r"admin\.socket: should have at most 107 bytes"):
        load(file)


async def test_without_a_socket_there_is_no_admin_api(upstream: Upstream, tmp_path: Path) -> None:
    front = Front(tmp_path, alike(upstream.url))
    config = orjson.loads(front.config.read_bytes()) | {"admin": {"socket": None}}
    front.config.write_bytes(orjson.dumps(config))
    async with front:
        assert not list(tmp_path.glob("*.sock*"))
        with socket.socket(socket.AF_UNIX) as probe, pytest.raises(FileNotFoundError):
            probe.connect(str(front.socket))
