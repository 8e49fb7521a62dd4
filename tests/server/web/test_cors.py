"""Pages of other sites: each response allows them alike."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from server.config.secrets import hash_key, new_key
from tests.server.conftest import CHAT, ROLE, Front, Upstream, answer, question, running, stream
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

APP, OTHER = "https://app.example", "https://other.example"
KEY = new_key()
KEYED = {"Authorization": f"Bearer {KEY}"}
ASKS = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


async def opinionated(http: web.Request) -> web.StreamResponse:
    """An engine that has other origins in mind."""
    headers = {"Access-Control-Allow-Origin": "*", "Vary": "Accept"}
    if http.path == "/v1/fails":
        return web.json_response({"error": {}}, status=500, headers=headers)
    return await stream(http, ROLE, headers=headers) if http.path != CHAT else await answer(http)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    folder = tmp_path_factory.mktemp("cors")
    sections = {
        "server": {"allowed_origins": [APP, "http://127.0.0.1:3000"]},
        "tenants": {"key": hash_key(KEY)},
    }
    async with running(folder, _upstream, sections=sections) as made:
        yield made


def cors_headers(response) -> tuple[str | None, str]:
    """Return which origin may read a response, and what it varies by."""
    allowed = response.headers.getall("Access-Control-Allow-Origin", [None])
    assert len(allowed) == 1
    return allowed[0], ", ".join(response.headers.getall("Vary", []))


async def test_every_response_says_so(shared: Front, upstream: Upstream) -> None:
    upstream.handler = opinionated
    plain, streamed = question(), question(stream=True)
    asked = [
        *((CHAT, {"json": each}) for each in (plain, plain, streamed, streamed)),
        (CHAT, {"json": plain | {"stream": True}}),
        (CHAT, {"json": question(temperature=1)}),
        (CHAT, {"json": question(), "headers": {}}),
        (CHAT, {"data": b"{"}),
        (CHAT, {"data": b" " * 200_000}),
        ("/v1/others", {"json": {}}),
        ("/v1/fails", {"json": {}}),
        ("/v1/load_lora_adapter", {"json": {}}),
    ]
    statuses = []
    for path, options in asked:
        for origin, expected in ((APP, APP), (OTHER, None), (None, None)):
            headers = options.get("headers", KEYED) | ({"Origin": origin} if origin else {})
            async with shared.session.post(path, **options | {"headers": headers}) as response:
                allowed, varies = cors_headers(response)
                assert (allowed, "Origin" in varies) == (expected, True), path
                assert ("Accept" in varies) is (path in ("/v1/others", "/v1/fails"))
                exposed = response.headers.get("Access-Control-Expose-Headers")
                assert exposed == (None if expected is None else "*")
                await response.read()
        statuses.append(response.status)
    assert statuses == [200] * 6 + [401, 400, 413, 200, 500, 403]
    for path in ("/health", "/ready", "/v1/models", "/", "/metrics", "/openapi.json"):
        async with shared.session.get(path, headers=KEYED | {"Origin": APP}) as response:
            assert cors_headers(response) == (APP, "Origin"), path


async def test_a_page_asks_first_and_needs_no_key_for_that(
    shared: Front, upstream: Upstream
) -> None:
    for path in (CHAT, "/v1/others", "/v1/models"):
        headers = ASKS | {"Origin": APP}
        async with shared.session.options(path, headers=headers) as response:
            assert (response.status, cors_headers(response)) == (204, (APP, "Origin"))
            assert response.headers["Access-Control-Allow-Methods"] == "POST"
            allowed = response.headers["Access-Control-Allow-Headers"]
            assert allowed == ASKS["Access-Control-Request-Headers"]
        async with shared.session.options(path, headers=ASKS | {"Origin": OTHER}) as response:
            assert (response.status, cors_headers(response)) == (401, (None, "Origin"))
    assert upstream.asked == []


async def test_limits_and_an_engine_that_is_down_are_said_to_pages_too(
    own_upstream: Upstream, tmp_path
) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"a: {{keys: ['{hash_key(KEY)}'], requests_per_minute: 1}}")
    sections = {"server": {"allowed_origins": ["*"]}, "tenants": {"file": str(tenants)}}
    async with running(tmp_path, own_upstream, sections=sections) as front:
        await own_upstream.stop()
        await front.until_ready(503)
        statuses = []
        # A minute later one more finds no engine.
        while 429 not in statuses:
            async with front.post(question(), headers=KEYED | {"Origin": OTHER}) as response:
                assert cors_headers(response) == ("*", "")
                assert response.headers["x-ratelimit-limit-requests"] == "1"
                statuses.append(response.status)
    assert {*statuses[:-1]} == {503}


async def test_without_origins_nobody_is_allowed(front: Front, upstream: Upstream) -> None:
    upstream.handler = opinionated
    asked = question()
    for path in (CHAT, CHAT, "/v1/others"):
        async with front.session.post(path, json=asked, headers={"Origin": APP}) as response:
            assert cors_headers(response)[0] is None
            await asyncio.wait_for(response.read(), HANGS_S)
