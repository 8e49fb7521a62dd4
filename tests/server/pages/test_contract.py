"""What the OpenAPI document describes is true, for right and wrong requests made out of it.

Nothing gets a 500 or none, and what is refused leaves nothing in the tiers. `tests/e2e/surface`
does the same with the real engine and all that it describes.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import orjson
import pytest
import pytest_asyncio
import requests
from aiohttp import web
from schemathesis import APIOperation, Case, GenerationMode, Response

from server.config.secrets import hash_key, new_key
from server.protocol.routes import CACHED_ROUTES, CachedRoute
from tests.openapi import RIGHT, check, operations, requests_of, send
from tests.server.conftest import Front, Upstream, answer, body, free_port, question, running
from tests.server.pages.test_openapi import engine_document
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KEY = new_key()
ADMIN_KEY = "0123456789abcdef"
EXAMPLES = 5

FIELDS = {
    "input": {"type": ["string", "array"]},
    "max_tokens": {"type": "integer"},
    "messages": {"type": "array", "items": {"type": "object"}},
    "model": {"enum": ["m", "n", "", None, "no"]},
    "prompt": {"type": ["string", "array"]},
    "stream": {"type": "boolean"},
    "temperature": {"type": "number", "minimum": 0},
}


def described(route: CachedRoute) -> dict:
    """A route, in short, as an engine describes it."""
    ok = {"description": "OK", "content": {"application/json": {"schema": {}}}}
    if route.streams:
        ok["content"]["text/event-stream"] = {}
    schema = {"type": "object", "properties": FIELDS}
    body = {"content": {"application/json": {"schema": schema}}, "required": True}
    return {"post": {"requestBody": body, "responses": {"200": ok}}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    """A server with a tenant, who may ask for anything."""
    folder = tmp_path_factory.mktemp("contract")
    tenant = {"keys": [hash_key(KEY)], "operator": True}
    (folder / "tenants.json").write_bytes(orjson.dumps({"us": tenant}))
    admin = {"port": free_port(), "key": ADMIN_KEY}
    sections = {"tenants": {"file": "tenants.json"}, "admin": admin}
    headers = {"Authorization": f"Bearer {KEY}"}
    prefix = {"path": str(folder / "prefix"), "max_bytes": "64MiB"}
    options = {"prefix": prefix, "sections": sections, "headers": headers}
    async with running(folder, _upstream, **options) as made:
        made.admin = f"http://127.0.0.1:{admin['port']}"
        yield made


async def refuse(http: web.Request) -> web.StreamResponse:
    await http.read()
    error = {"message": "no engine takes this", "type": "BadRequestError", "param": None}
    return web.json_response({"error": error | {"code": 400}}, status=400)


async def give(http: web.Request) -> web.StreamResponse:
    return await answer(http) if CACHED_ROUTES[http.path].streams else web.json_response(body())


def engine(respond: Handler) -> Handler:
    """Return an engine that describes itself, and responds so on the routes of answers."""

    async def handle(http: web.Request) -> web.StreamResponse:
        if http.path == "/openapi.json":
            paths = {path: described(route) for path, route in CACHED_ROUTES.items()}
            return web.json_response(engine_document(**paths))
        if http.path == "/metrics":
            return web.Response(text="# HELP x x\n")
        return await respond(http) if http.path in CACHED_ROUTES else web.json_response({})

    return handle


async def made_requests(operation: APIOperation, most: int) -> list[tuple[GenerationMode, Case]]:
    """Make requests beside the upstream of this loop, which is to go on answering probes."""
    return await asyncio.to_thread(requests_of, operation, most)


async def test_what_the_document_says_is_so(front: Front, upstream: Upstream) -> None:
    upstream.handler = engine(refuse)
    async with front.session.get("/openapi.json") as reply:
        document = await reply.json()
    cases = [
        case
        for operation in operations(document)
        for _, case in await made_requests(operation, EXAMPLES)
    ]
    assert len(cases) > 150
    with requests.Session() as session:
        # The environment may have a proxy, or a key for this host.
        session.trust_env = False
        session.headers.update(front.headers)

        async def sent(case: Case, **headers: str) -> Response:
            return await asyncio.to_thread(send, session, front.url, case, HANGS_S, **headers)

        for respond in (refuse, give):
            upstream.handler = engine(respond)
            for case in cases:
                response = await sent(case)
                assert response.status_code < 500, case.as_curl_command()
                check(case, response)
                if case.path in CACHED_ROUTES and response.status_code >= 400:
                    again = await sent(case, **{"Cache-Control": "only-if-cached"})
                    assert again.status_code >= 400, case.as_curl_command()
            entries = await front.metric("tierserve_tier_entries")
            assert (entries > 0) is (respond is give)
    assert (await front.ask(question()))[0] == 200
    log = front.log.read_text()
    assert "Traceback" not in log
    assert "a request failed" not in log


async def test_what_the_document_of_the_admin_api_says_is_so(
    front: Front, upstream: Upstream
) -> None:
    upstream.handler = engine(give)
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {ADMIN_KEY}"

        async def ask(case: Case) -> Response:
            response = await asyncio.to_thread(send, session, front.admin, case, HANGS_S)
            assert response.status_code < 500, case.as_curl_command()
            check(case, response)
            return response

        document = session.get(f"{front.admin}/openapi.json", timeout=HANGS_S).json()
        described = {(each.method, each.path): each for each in operations(document)}
        assert len(described) == 14
        await front.ask(question())
        page = await ask(described["get", "/entries"].Case())
        key = page.json()["entries"][0]["key"]
        for method, status in (("get", 200), ("delete", 204), ("get", 404)):
            named = described[method, "/entries/{key}"].Case(path_parameters={"key": key})
            assert (await ask(named)).status_code == status
        for (_, path), operation in described.items():
            for mode, case in await made_requests(operation, 4 * EXAMPLES):
                response = await ask(case)
                if mode is RIGHT and path in ("/export", "/prefixes", "/verify"):
                    assert response.status_code == 200, case.as_curl_command()
        purge = described["post", "/purge"]
        for asked in ({"all": True}, {"tag": "t"}, {"key": [key]}, {"model": ["m"], "tag": "t"}):
            response = await ask(purge.Case(body=asked, media_type="application/json"))
            assert response.status_code == (200 if len(asked) == 1 else 400)
        session.headers["Authorization"] = "Bearer wrong"
        for operation in described.values():
            for _, case in await made_requests(operation, 1):
                assert (await ask(case)).status_code == 401
