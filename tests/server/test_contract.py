"""What the OpenAPI document says is so, for requests that are made out of it, right and wrong.

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
from schemathesis import Case, Response

from server.keys import hashed, new_key
from server.routes import ROUTES, Route
from tests.openapi import check, operations, requests_of, send

from .conftest import Front, Upstream, answer, body, question, running
from .test_openapi import engine_document

pytestmark = pytest.mark.asyncio(loop_scope="module")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KEY = new_key()
EXAMPLES = 5
HANGS_S = 20

FIELDS = {
    "input": {"type": ["string", "array"]},
    "max_tokens": {"type": "integer"},
    "messages": {"type": "array", "items": {"type": "object"}},
    "model": {"enum": ["m", "n", "", None, "no"]},
    "prompt": {"type": ["string", "array"]},
    "stream": {"type": "boolean"},
    "temperature": {"type": "number", "minimum": 0},
}


def described(route: Route) -> dict:
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
    tenant = {"keys": [hashed(KEY)], "operator": True}
    (folder / "tenants.json").write_bytes(orjson.dumps({"us": tenant}))
    sections = {"tenants": {"file": "tenants.json"}}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with running(folder, _upstream, sections=sections, headers=headers) as made:
        yield made


async def refuse(http: web.Request) -> web.StreamResponse:
    await http.read()
    error = {"message": "no engine takes this", "type": "BadRequestError", "param": None}
    return web.json_response({"error": error | {"code": 400}}, status=400)


async def give(http: web.Request) -> web.StreamResponse:
    return await answer(http) if ROUTES[http.path].streams else web.json_response(body())


def engine(say: Handler) -> Handler:
    """Return an engine that describes itself, and does what `say` does on the routes of answers."""

    async def handle(http: web.Request) -> web.StreamResponse:
        if http.path == "/openapi.json":
            paths = {path: described(route) for path, route in ROUTES.items()}
            return web.json_response(engine_document(**paths))
        if http.path == "/metrics":
            return web.Response(text="# HELP x x\n")
        return await say(http) if http.path in ROUTES else web.json_response({})

    return handle


async def test_what_the_document_says_is_so(front: Front, upstream: Upstream) -> None:
    upstream.handler = engine(refuse)
    async with front.session.get("/openapi.json") as reply:
        document = await reply.json()
    cases = [
        case for operation in operations(document) for _, case in requests_of(operation, EXAMPLES)
    ]
    assert len(cases) > 150
    with requests.Session() as session:
        session.headers.update(front.headers)

        async def sent(case: Case, **headers: str) -> Response:
            return await asyncio.to_thread(send, session, front.url, case, HANGS_S, **headers)

        for say in (refuse, give):
            upstream.handler = engine(say)
            for case in cases:
                response = await sent(case)
                assert response.status_code < 500, case.as_curl_command()
                check(case, response)
                if case.path in ROUTES and response.status_code >= 400:
                    again = await sent(case, **{"Cache-Control": "only-if-cached"})
                    assert again.status_code >= 400, case.as_curl_command()
            entries = await front.metric("tierserve_tier_entries")
            assert (entries > 0) is (say is give)
    assert (await front.ask(question()))[0] == 200
    log = front.log.read_text()
    assert "Traceback" not in log
    assert "a request failed" not in log
