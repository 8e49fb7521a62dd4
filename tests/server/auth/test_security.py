"""Who may ask, and what nobody gets to know: over real sockets, in front of a scripted upstream."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import orjson
import pytest
import pytest_asyncio
import yaml
from aiohttp import web
from multidict import CIMultiDict

from server.config.secrets import hash_key, new_key
from tests.server.conftest import CHAT, Front, Upstream, alike, body, held, question, running
from tests.servers import free_port
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("acme", "busy", "east", "few", "globex", "ops", "west")
KEYS = {name: new_key() for name in NAMES}
CIPHER_KEY = os.urandom(32).hex()
ADMIN_KEY, ENGINE_KEY = new_key(), "sk-of-the-engine-4711"
PASSWORD = "pw-of-the-engine-4712"
TENANTS = {
    "acme": {},
    "busy": {"max_requests": 1},
    "east": {"scope": "compass"},
    "few": {"requests_per_minute": 1},
    "globex": {},
    "ops": {"operator": True},
    "west": {"scope": "compass"},
}
ADMIN_ROUTES = [
    ("GET", "/stats"), ("GET", "/entries"), ("GET", "/entries/k"), ("DELETE", "/entries/k"),
    ("POST", "/purge"), ("GET", "/export"), ("POST", "/import"), ("POST", "/compact"),
    ("GET", "/overview"), ("GET", "/config"), ("GET", "/admin/"), ("GET", "/pages/"),
    ("POST", "/verify"), ("GET", "/prefixes"), ("GET", "/"), ("OPTIONS", "/stats"),
    ("HEAD", "//stats"),
]  # fmt: skip
PATHS = (
    CHAT, "/docs/", "/health/", "/metrics", "/metrics/engine", "/nowhere", "/openapi.json",
    "/overview", "/pages/", "/pages/../overview", "/pause", "/tokenize", "/v1/completions",
    "/v1/embeddings", "/v1/messages", "/v1/models", "/v1/realtime", "/v1/responses/resp_1",
    "/version",
)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND")
ODD_TARGETS = (
    "//v1/models", "//health", "/v1/../metrics", "/health/../metrics", "/health/..%2fmetrics",
    "/%6detrics", "/metrics?", "/metrics?x=/health", "/metrics#/health", "/metrics;/health",
    "/./metrics", "/HEALTH", "/health%00", "/health%2f", "/ready//", "/metrics/../health",
    "http://front/metrics", "http://front/health/../v1/models", "http://front", "*",
    "/v1/models/../../pause", "/v1\\models", "/" + "a/" * 2000,
)  # fmt: skip


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def write(file: Path, tenants: dict) -> None:
    """Replace the file of tenants at once, as one should."""
    given = {n: {"keys": [hash_key(KEYS[n])]} | record for n, record in tenants.items()}
    made = file.with_suffix(".new")
    made.write_text(yaml.safe_dump(given))
    made.replace(file)


async def nothing(_: web.Request) -> web.Response:
    return web.Response()


async def raw(front: Front, head: str) -> tuple[int, bytes]:
    """Send bytes as they are; returns the status, and all that comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(head.encode())
    reply = await asyncio.wait_for(reader.read(), HANGS_S)
    writer.close()
    await writer.wait_closed()
    return int(reply.split(b" ", 2)[1]), reply


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    """A server with tenants, and an admin port that is `front.admin`."""
    folder = tmp_path_factory.mktemp("guarded")
    write(folder / "tenants.yaml", TENANTS)
    port = free_port()
    sections = {
        "tenants": {"file": "tenants.yaml"},
        "models": {
            name: model | {"api_key": ENGINE_KEY} for name, model in alike(_upstream.url).items()
        }
        | {"n": {"upstreams": [_upstream.url.replace("//", f"//me:{PASSWORD}@")]}},
        "admin": {"port": port, "key": ADMIN_KEY},
        "server": {"max_prompts": 3},
    }
    disk = {"path": str(folder / "disk"), "max_bytes": "4MiB", "encryption_key": CIPHER_KEY}
    options = {"sections": sections, "headers": bearer("ops"), "disk": disk}
    async with running(folder, _upstream, **options) as made:
        made.admin = f"http://127.0.0.1:{port}"
        made.tenants = folder / "tenants.yaml"
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def nobody(guarded: Front) -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a key."""
    async with aiohttp.ClientSession(guarded.url) as session:
        yield session


def is_unauthorized(reply: aiohttp.ClientResponse, body: bytes) -> bool:
    if reply.method != "HEAD":
        error = orjson.loads(body)["error"]
        if reply.url.path.startswith("/v1/messages"):
            assert error["type"] == "authentication_error"
        else:
            assert error["type"] == "invalid_request_error"
            assert error["code"] == "invalid_api_key"
        assert "API key" in error["message"]
    return reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", PATHS)
async def test_each_route_needs_a_key(guarded, upstream, nobody, path: str) -> None:
    wrong = (
        {},
        {"Authorization": f"Bearer {new_key()}"},
        {"x-api-key": new_key()},
        {"x-api-key": ADMIN_KEY},
        {"Authorization": "Bearer " + hash_key(KEYS["ops"])},
        {"Authorization": f"Basic {KEYS['ops']}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer", "x-api-key": ""},
        {"Authorization": f"Bearer {KEYS['ops'][:-1]}"},
        {"Authorization": f"Bearer {KEYS['ops']}x"},
        {"Authorization": "\udcff"},
    )
    for method, headers in itertools.product(METHODS, wrong):
        async with nobody.request(method, path, headers=headers, data=b"{}") as reply:
            assert is_unauthorized(reply, await reply.read()), (method, headers)
    assert upstream.asked == []


@pytest.mark.parametrize("target", ODD_TARGETS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT"])
async def test_odd_targets_need_one_too(guarded, upstream, method: str, target: str) -> None:
    head = f"{method} {target} HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n"
    status, _ = await raw(guarded, head)
    assert status in (400, 401)
    assert upstream.asked == []


async def test_websockets_and_bodies_that_wait_need_one(guarded, upstream, nobody) -> None:
    for path in ("/v1/realtime", "/health/x", "/ws"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await nobody.ws_connect(path)
        assert caught.value.status == 401
    # Nobody is invited to send what isn't read.
    status, reply = await raw(
        guarded,
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n"
        "Connection: close\r\n\r\n",
    )
    assert status == 401
    assert b"100 Continue" not in reply
    assert upstream.asked == []


async def test_what_says_that_it_lives_is_open(guarded, nobody) -> None:
    for path in ("/health", "/ready", "/health?x=1"):
        async with nobody.get(path) as reply:
            assert reply.status == 200


@pytest.mark.parametrize(("header", "prefix"), [("Authorization", "bEARER  "), ("x-api-key", "")])
async def test_a_key_opens(guarded, nobody, header: str, prefix: str) -> None:
    async with nobody.post(CHAT, json=question(), headers={header: prefix + KEYS["acme"]}) as reply:
        assert reply.status == 200


async def test_two_keys_open_nothing(guarded, upstream, nobody) -> None:
    places = [(path, KEYS["ops"]) for path in PATHS] + [(f"{guarded.admin}/stats", ADMIN_KEY)]
    for (where, key), name in itertools.product(places, ("Authorization", "x-api-key")):
        headers = CIMultiDict([(name, f"Bearer {key}" if name == "Authorization" else key)] * 2)
        async with nobody.post(where, json={}, headers=headers) as reply:
            assert (reply.status, name in await reply.text()) == (400, True), where
    assert upstream.asked == []


async def test_only_those_of_one_scope_share_answers(guarded, upstream) -> None:
    asked = question()
    outcomes = {}
    for name in ("acme", "globex", "east", "west", "acme", "globex"):
        _, status, _ = await guarded.ask(asked, headers=bearer(name))
        outcomes.setdefault(name, []).append("hit" if "; hit" in status else "miss")
    expected = {"acme": ["miss", "hit"], "globex": ["miss", "hit"], "east": ["miss"]}
    assert outcomes == expected | {"west": ["hit"]}
    assert len(upstream.asked) == 3
    # Nor does anybody learn that somebody has asked.
    only = bearer("ops") | {"Cache-Control": "only-if-cached"}
    assert (await guarded.ask(asked, headers=only))[0] == 504


async def test_who_floods_the_tiers_takes_nobody_elses_part(tmp_path: Path, upstream) -> None:
    async def long(http: web.Request) -> web.StreamResponse:
        return web.json_response(body("long " * 2000))

    upstream.handler = long
    write(tmp_path / "tenants.yaml", {"acme": {}, "globex": {}, "ops": {"operator": True}})
    options = {
        "sections": {"tenants": {"file": "tenants.yaml"}, "server": {"max_body_bytes": 100_000}},
        "headers": bearer("ops"),
        "memory": {"max_bytes": "1MiB"},
    }
    async with running(tmp_path, upstream, **options) as front:
        theirs = [question() for _ in range(20)]
        for asked in theirs:
            await front.ask(asked, headers=bearer("acme"))
        for _ in range(600):
            await front.ask(question(), headers=bearer("globex"))
        for tier, evictions in (("memory", 300), ("disk", 100)):
            # The disk tier commits, and evicts, after the answers.
            await front.until_above(f'tierserve_tier_evictions_total{{tier="{tier}"}}', evictions)
        for asked in theirs:
            _, status, _ = await front.ask(asked, headers=bearer("acme"))
            assert status.startswith("tierserve; hit")
            assert status.endswith("detail=memory")


async def test_nobody_joins_what_another_tenant_waits_for(guarded, upstream) -> None:
    go = asyncio.Event()
    upstream.handler = held(go)
    asked = question(stream=True)
    async with guarded.post(asked, headers=bearer("acme")) as first:
        await first.content.readany()
        async with guarded.post(asked, headers=bearer("globex")) as second:
            await second.content.readany()
            assert "collapsed" not in second.headers["Cache-Status"]
            go.set()
    assert len(upstream.asked) == 2


async def salt_of(guarded, upstream, name: str, path: str = CHAT, **more) -> str | None:
    """Return the salt that the upstream got for a new question."""
    upstream.asked.clear()
    seen = []

    async def answer(http):
        seen.append(orjson.loads(await http.read()))
        return web.json_response(body())

    upstream.handler = answer
    asked = question(**more)
    async with guarded.session.post(path, json=asked, headers=bearer(name)) as reply:
        assert reply.status == 200
    # Which model is meant is told an engine that has several names.
    sent = {name: value for name, value in seen[0].items() if name != "model"}
    salt = sent.pop("cache_salt", None)
    asked.pop("cache_salt", None)
    assert sent == asked
    return salt


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/systemone"])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"stream": False}])
async def test_each_scope_has_its_own_cache_salt(guarded, upstream, path: str, more) -> None:
    salts = {n: await salt_of(guarded, upstream, n, path, **more) for n in ("acme", "globex")}
    assert len(set(salts.values())) == 2
    assert await salt_of(guarded, upstream, "acme", path, **more) == salts["acme"]
    east, west = [await salt_of(guarded, upstream, n, path, **more) for n in ("east", "west")]
    assert east == west
    # A client's own is taken apart from all others', and doesn't name another's.
    own = await salt_of(guarded, upstream, "acme", path, **more, cache_salt="a")
    assert own not in salts.values()
    assert own != await salt_of(guarded, upstream, "globex", path, **more, cache_salt="a")
    stolen = await salt_of(guarded, upstream, "acme", path, **more, cache_salt=salts["globex"])
    assert stolen not in salts.values()
    # What isn't a salt is the engine's to refuse.
    assert await salt_of(guarded, upstream, "acme", path, **more, cache_salt="") == ""


async def test_routes_without_a_salt_are_sent_none(guarded, upstream) -> None:
    assert await salt_of(guarded, upstream, "acme", "/tokenize") is None


@pytest.mark.parametrize("path", ["/invocations", "/v1/systemone"])
async def test_what_engines_take_beyond_json_gets_past_no_salt(guarded, upstream, path) -> None:
    async def echo(http):
        return web.Response(body=await http.read())

    upstream.handler = echo
    odd = (b"NaN", b"1e999", b'"\\ud800"')
    bodies = [b'{"cache_salt": "of another", "x": %s}' % value for value in odd]
    for given in (*bodies, '{"cache_salt": "of another"}'.encode("utf-16")):
        async with guarded.session.post(path, data=given) as reply:
            assert reply.status == 200
            sent = json.loads(await reply.read())
            assert sent["cache_salt"] not in ("of another", None)
            assert sent.keys() == json.loads(given).keys()
    upstream.asked.clear()
    for given in (b"{", b"\xff"):
        async with guarded.session.post(path, data=given) as reply:
            assert reply.status == 400
            assert (await reply.json())["error"]["param"] == "body"
    assert upstream.asked == []


async def test_a_body_that_is_no_object_is_passed_on(guarded, upstream) -> None:
    async def echo(http):
        return web.Response(body=await http.read())

    upstream.handler = echo
    for given in (b"[1]", b"2"):
        async with guarded.session.post("/v1/systemone", data=given) as reply:
            assert await reply.read() == given
    deep = b'{"cache_salt": "a", "x": ' + b"[" * 1020 + b"]" * 1020 + b"}"
    async with guarded.session.post("/v1/systemone", data=deep) as reply:
        assert reply.status in (200, 400)


async def test_no_engine_sees_a_clients_key(guarded, upstream, nobody) -> None:
    ways = [bearer("acme"), {"x-api-key": KEYS["acme"]}]
    ways += [bearer("acme") | {"X-API-KEY": KEYS["acme"]}]
    for path, headers in itertools.product((CHAT, "/v1/responses", "/tokenize"), ways):
        for more in ({}, {"temperature": 1}):
            upstream.asked.clear()
            async with nobody.post(path, json=question(**more), headers=headers) as reply:
                assert reply.status == 200
            (http,) = upstream.asked
            assert http.headers.getall("Authorization") == [f"Bearer {ENGINE_KEY}"]
            assert not any(KEYS["acme"] in value for value in http.headers.values())


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/metrics"), ("GET", "/metrics/engine"), ("POST", "/pause"), ("POST", "/sleep"),
     ("GET", "/server_info"), ("GET", "/load"),
     ("POST", "/collective_rpc"), ("POST", "/cohere/v2/chat"), ("POST", "//v1/completions"),
     ("POST", "/v1/models/../../metrics"), ("PUT", "/v1/models/%2e%2e/%2e%2e/metrics"),
     ("GET", "/v1/responses/../load"), ("DELETE", "/v1/models/.."), ("POST", "/v1/new")],
)  # fmt: skip
async def test_the_engine_itself_is_for_operators(guarded, upstream, method, path) -> None:
    upstream.handler = nothing
    for name, status in (("acme", 403), ("ops", 200)):
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-api-key: {KEYS[name]}"
        )
        got, body = await raw(guarded, head + "\r\n\r\n")
        assert got == status
        if name == "acme":
            assert b"operator" in body
            assert upstream.asked == []


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/v1/responses/r/cancel"])
async def test_what_tells_nothing_of_others_is_for_all(guarded, upstream, path: str) -> None:
    upstream.handler = nothing
    async with guarded.session.get(path, headers=bearer("acme")) as reply:
        assert reply.status == 200


@pytest.mark.parametrize("name", ["acme", "ops"])
async def test_nothing_is_behind_the_names_of_models(guarded, upstream, name: str) -> None:
    upstream.handler = nothing
    for path in ("a/b", "../../metrics", "%2e%2e/%2e%2e/metrics", ".."):
        head = f"GET /v1/models/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        got, _ = await raw(guarded, f"{head}x-api-key: {KEYS[name]}\r\n\r\n")
        assert got == 404
    for path in ("load", "unload"):
        head = f"POST /v1/{path}_lora_adapter HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        got, _ = await raw(guarded, f"{head}x-api-key: {KEYS[name]}\r\n\r\n")
        assert got == 403
    assert upstream.asked == []


async def test_a_tenant_is_limited_by_the_minute(guarded, upstream) -> None:
    asked = question()
    async with guarded.post(asked, headers=bearer("few")) as reply:
        assert reply.status == 200
        assert reply.headers["x-ratelimit-limit-requests"] == "1"
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert reply.headers["x-ratelimit-reset-requests"] in ("1m0s", "59s", "58s")
    async with guarded.post(asked, headers=bearer("few")) as reply:
        assert reply.status == 429
        assert 1 <= int(reply.headers["Retry-After"]) <= 60
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        error = (await reply.json())["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    async with guarded.post(asked, headers=bearer("acme")) as reply:
        assert reply.status == 200
        assert "x-ratelimit-limit-requests" not in reply.headers
    assert await guarded.metric('tierserve_tenant_requests_total{tenant="few"}') == 1
    line = 'tierserve_tenant_refused_total{limit="requests_per_minute",tenant="few"}'
    assert await guarded.metric(line) == 1


async def test_a_tenant_is_limited_at_once(guarded, upstream) -> None:
    go = asyncio.Event()
    upstream.handler = held(go)
    async with guarded.post(question(stream=True), headers=bearer("busy")) as first:
        await first.content.readany()
        async with guarded.post(question(), headers=bearer("busy")) as second:
            assert second.status == 429
            assert second.headers["Retry-After"] == "1"
        go.set()
        await first.read()
    for _ in range(3):
        # A connection that is cut counts no longer, either.
        async with guarded.post(question(stream=True), headers=bearer("busy")) as reply:
            assert reply.status == 200
            await reply.read()
    assert await guarded.metric('tierserve_tenant_active{tenant="busy"}') == 0


async def test_a_request_has_a_bounded_number_of_prompts(guarded, upstream) -> None:
    for prompt, status in ((["a"] * 3, 200), ([1] * 4, 200), (["a"] * 4, 400), ([[1]] * 4, 400)):
        upstream.handler = completion
        asked = {"prompt": prompt, "temperature": 0}
        async with guarded.session.post("/v1/completions", json=asked) as reply:
            assert reply.status == status
            if status == 400:
                error = (await reply.json())["error"]
                assert error["param"] == "prompt"
                assert "at most 3 prompts, not 4" in error["message"]


async def completion(_):
    choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"}
    return web.json_response({"id": "cmpl-x", "created": 1, "choices": [choice]})


async def test_keys_come_and_go_while_it_runs(guarded, upstream) -> None:
    KEYS["late"] = new_key()
    async with guarded.post(question(), headers=bearer("busy")) as reply:
        assert reply.status == 200
    counted = await guarded.metric('tierserve_tenant_requests_total{tenant="busy"}')
    assert counted > 0
    go = asyncio.Event()
    upstream.handler = held(go)
    async with guarded.post(question(stream=True), headers=bearer("acme")) as running_on:
        await running_on.content.readany()
        await guarded.until_status(bearer("late"), 401)
        write(guarded.tenants, TENANTS | {"late": {}})
        await guarded.until_status(bearer("late"), 200)
        without = {n: record for n, record in TENANTS.items() if n != "acme"}
        write(guarded.tenants, without)
        await guarded.until_status(bearer("acme"), 401)
        # What is under way ends as it would have.
        go.set()
        assert b"[DONE]" in await running_on.read()
    await guarded.until_status(bearer("late"), 401)
    # What was counted stays.
    assert await guarded.metric('tierserve_tenant_requests_total{tenant="busy"}') == counted
    write(guarded.tenants, TENANTS)
    await guarded.until_status(bearer("acme"), 200)


@pytest.mark.parametrize(
    "broken",
    ["", "acme: [", "acme: {keys: [KEY]}", "a: {no: 1}", "a: 0-1: [", "a: 2024-13-45", None],
)
async def test_a_broken_file_changes_nothing(guarded, broken: str | None) -> None:
    kept = "and changes nothing"
    before = guarded.log.read_text().count(kept)
    if broken is None:
        guarded.tenants.unlink()
    else:
        guarded.tenants.write_text(broken.replace("KEY", KEYS["acme"]))
    await guarded.until_logged(kept, before + 1)
    await guarded.until_status(bearer("acme"), 200)
    read = guarded.log.read_text().count("tenants.yaml again")
    write(guarded.tenants, TENANTS)
    guarded.process.send_signal(1)
    await guarded.until_logged("tenants.yaml again", read + 1)


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_the_admin_port_needs_its_key(guarded, method: str, path: str) -> None:
    async with aiohttp.ClientSession(guarded.admin) as session:
        for headers in ({}, *map(bearer, TENANTS), {"Authorization": hash_key(ADMIN_KEY)}):
            url = guarded.admin + path
            async with session.request(method, url, headers=headers, data=b"{}") as reply:
                assert is_unauthorized(reply, await reply.read())
        given = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with session.request(method, guarded.admin + path, headers=given) as reply:
            assert reply.status != 401


async def test_the_admin_port_does_what_the_socket_does(guarded, upstream) -> None:
    asked = question()
    await guarded.ask_alone(asked, headers=bearer("acme"))
    assert "; hit" in (await guarded.ask(asked, headers=bearer("acme")))[1]
    async with (
        aiohttp.ClientSession(guarded.admin, headers={"x-api-key": ADMIN_KEY}) as session,
        session.post("/purge", json={"tenant": "acme"}) as reply,
    ):
        assert await reply.json() == {"purged": ["tenant:acme"]}
    reply = await guarded.ask(asked, headers=bearer("acme"))
    assert "fwd=miss" in reply[1], reply
    assert upstream.asked, reply


async def test_no_secret_shows(guarded, upstream, nobody) -> None:
    """After all that was asked above, and some more that fails."""
    texts = []
    for name, path in itertools.product(("acme", "ops"), ("/metrics", "/v1/models", "/nowhere")):
        async with guarded.session.get(path, headers=bearer(name)) as reply:
            texts += [await reply.read(), str(reply.headers).encode()]
    wrong = KEYS["acme"] + "x"
    async with nobody.get("/v1/models", headers={"Authorization": f"Bearer {wrong}"}) as reply:
        texts += [await reply.read(), str(reply.headers).encode()]
    async with nobody.get("/v1/models", headers={"Authorization": wrong}) as reply:
        texts += [await reply.read(), str(reply.headers).encode()]
    command = [sys.executable, "-m", "server.cli", "check", "--config", str(guarded.config)]
    # Beside the upstream of this loop, which is to go on answering probes.
    checked = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
    texts += [checked.stdout, checked.stderr, guarded.log.read_bytes()]
    async with aiohttp.ClientSession(guarded.admin, headers={"x-api-key": ADMIN_KEY}) as session:
        for path in ("/config", "/overview", "/prefixes", "/stats", "/entries"):
            async with session.get(path) as reply:
                assert reply.status == 200
                texts += [await reply.read()]
    assert b"max_prompts: 3" in checked.stdout
    content = (guarded.config.parent / "disk" / "data.mdb").read_bytes()
    texts.append(content)
    for secret in (*KEYS.values(), ADMIN_KEY, ENGINE_KEY, CIPHER_KEY, PASSWORD):
        assert not [text for text in texts if secret.encode() in text]
    # Nor does the file tell what was asked or answered, by whom, or of what. What is encrypted may
    # hold any shorter text, such as the name of a tenant of four letters.
    assert len(content) > 10_000
    for text in (b"question", b"assistant", b"chat.completion", b"globex", b"tenant:", b"model:"):
        assert text not in content
    # Of hashes only the file of tenants knows.
    for secret in (*KEYS.values(), ADMIN_KEY):
        assert not [text for text in texts if hash_key(secret).encode() in text]


async def test_an_engine_is_sent_the_password_of_its_address(guarded, upstream) -> None:
    asked = question(model="n")
    reply = await guarded.ask(asked, headers=bearer("acme"))
    assert "fwd=miss" in reply[1], reply
    assert upstream.asked, reply
    (http,) = upstream.asked
    assert http.headers["Authorization"] == aiohttp.encode_basic_auth("me", PASSWORD)


async def test_one_key_is_enough_for_one_tenant(upstream, tmp_path, monkeypatch) -> None:
    key = new_key()
    monkeypatch.setenv("TIERSERVE__TENANTS__KEY", key)
    sections = {"tenants": {"open_metrics": True}}
    given = {"Authorization": f"Bearer {key}"}
    async with running(tmp_path, upstream, sections=sections) as front:
        for headers, status in ((given, 200), ({}, 401)):
            async with front.post(question(), headers=headers) as reply:
                assert reply.status == status
        # Metrics are open where that is said; an operator reads all else.
        assert await front.metric("tierserve_turned_away_total") == 1
        upstream.handler = nothing
        async with front.session.post("/pause", headers=given) as reply:
            assert reply.status == 200
        (http, *_) = upstream.asked
        assert "Authorization" not in http.headers
        async with front.session.get("/metrics/engine", headers={"x-api-key": "mine"}) as reply:
            assert reply.status == 200
        assert "x-api-key" not in upstream.asked[-1].headers


async def test_without_keys_all_may_ask_and_share_nothing(front, upstream) -> None:
    asked = question()
    ways = [{}, {"Authorization": "Bearer a"}, {"x-api-key": "a"}, {"x-api-key": "b"}]
    ways += [{"Authorization": "Bearer a", "x-api-key": "a"}]
    for times, headers in enumerate(ways, 1):
        assert "fwd=miss" in (await front.ask(asked, headers=headers))[1]
        assert len(upstream.asked) == times
        # An engine that knows its clients is told who asks, and there are no salts.
        assert upstream.asked[-1].headers.get("x-api-key") == headers.get("x-api-key")
        assert upstream.asked[-1].headers.get("Authorization") == headers.get("Authorization")
    for headers in ways:
        assert "; hit" in (await front.ask(asked, headers=headers))[1]
