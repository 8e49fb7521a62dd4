"""The OpenAPI document: what is made of an engine's, and how it is served."""

from collections.abc import Iterator

import orjson
import pytest
from aiohttp import web

from server.pages.openapi import build_document
from server.protocol.cache_field import SCHEMA, parse_cache_field
from server.protocol.errors import BadRequestError
from server.protocol.routes import CACHED_ROUTES
from tests.server.conftest import CHAT, Upstream, alike, answer, body, question, running

OWN = {
    "/",
    "/docs",
    "/health",
    "/metrics",
    "/metrics/engine",
    "/openapi.json",
    "/overview",
    "/ready",
    "/v1/models",
    "/v1/models/{model}",
}
CHAT_SCHEMA = {"type": "object", "required": ["messages"], "properties": {"n": {"type": "integer"}}}


def engine_document(**paths: dict) -> dict:
    """As FastAPI makes it."""
    ok = {"description": "Successful Response", "content": {"application/json": {"schema": {}}}}
    refused = {"description": "Validation Error"}
    asked = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Chat"}}}}
    made = {
        CHAT: {"post": {"requestBody": asked, "responses": {"200": ok, "422": refused}}},
        "/health": {"get": {"summary": "theirs", "responses": {"200": ok}}},
        "/pause": {"post": {"responses": {"200": ok}}},
        "/v1/embeddings": {"post": {"requestBody": asked, "responses": {"200": ok}}},
        "/v1/models": {"get": {"responses": {"200": ok}}},
    }
    schemas = {"Chat": CHAT_SCHEMA}
    return {"openapi": "3.1.0", "paths": made | paths, "components": {"schemas": schemas}}


def made(engine: dict | None, **options: bool) -> dict:
    engines = [] if engine is None else [engine]
    return build_document(engines, kept=CACHED_ROUTES, version="1.2.3", **options)


def operations(document: dict) -> Iterator[tuple[str, str, dict]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def references(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for each in part.values():
            yield from references(each)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


@pytest.mark.parametrize("engine", [None, engine_document()], ids=["none", "vllm"])
@pytest.mark.parametrize("has_keys", [False, True])
def test_it_holds_together(engine: dict | None, has_keys: bool) -> None:
    document = made(engine, has_keys=has_keys)
    assert document["openapi"].startswith("3.1")
    for reference in references(document):
        part = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
    ids = [operation.get("operationId") for *_, operation in operations(document)]
    known = [each for each in ids if each]
    assert len(known) == len(set(known))
    tags = {each["name"] for each in document["tags"]}
    for path, _, operation in operations(document):
        assert set(operation["tags"]) <= tags
        assert "200" in operation["responses"]
        assert "422" not in operation["responses"]
        assert ("401" in operation["responses"]) == (
            has_keys and path not in ("/", "/docs", "/health", "/ready")
        )
        for response in operation["responses"].values():
            assert response["description"]
            assert "X-Request-Id" in response["headers"]


def test_without_an_engine_it_has_our_routes() -> None:
    assert set(made(None)["paths"]) == OWN | set(CACHED_ROUTES)


def test_what_we_add_to_a_route_whose_answers_are_kept() -> None:
    operation = made(engine_document(), has_keys=True)["paths"][CHAT]["post"]
    theirs, ours = operation["requestBody"]["content"]["application/json"]["schema"]["allOf"]
    assert theirs == {"$ref": "#/components/schemas/Chat"}
    assert set(ours["properties"]) == {"cache"}
    assert {each["name"] for each in operation["parameters"]} == {
        "Cache-Control",
        "If-None-Match",
        "X-Request-Id",
    }
    assert set(operation["responses"]["200"]["headers"]) == {
        "Age",
        "Cache-Status",
        "ETag",
        "X-Request-Id",
        "X-Tierserve-Fallback",
    }
    assert set(operation["responses"]) == {
        "200", "304", "400", "401", "404", "408", "413", "429", "502", "503", "504"
    }  # fmt: skip
    assert "Retry-After" in operation["responses"]["429"]["headers"]


def test_an_engines_description_of_our_routes_is_left_out() -> None:
    document = made(engine_document())
    assert document["paths"]["/health"]["get"]["summary"] != "theirs"


def test_routes_that_we_refuse_are_left_out() -> None:
    document = made(engine_document(**{"/v1/load_lora_adapter": {"post": {"responses": {}}}}))
    assert "/v1/load_lora_adapter" not in document["paths"]


def test_errors_have_all_schemas_that_they_may_have() -> None:
    own = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Theirs"}}}}
    theirs = {"post": {"responses": {"200": {}, "415": own | {"description": "Not JSON"}}}}
    paths = made(engine_document(**{"/v1/messages": theirs, "/x": theirs}))["paths"]
    for path, shapes in {
        "/v1/messages": ["TierserveMessagesError", "TierserveError", "TierserveDetail"],
        "/x": ["TierserveError", "TierserveDetail"],
    }.items():
        response = paths[path]["post"]["responses"]["415"]
        assert response["description"] == "Not JSON"
        assert response["content"]["application/json"]["schema"] == {
            "anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in shapes]
        }


def test_what_takes_an_operators_key_says_so() -> None:
    paths = made(engine_document(), has_keys=True)["paths"]
    assert "403" in paths["/pause"]["post"]["responses"]
    assert "403" in paths["/metrics"]["get"]["responses"]
    assert "403" not in paths["/v1/models"]["get"]["responses"]
    opened = made(engine_document(), has_keys=True, open_metrics=True)["paths"]
    assert set(opened["/metrics"]["get"]["responses"]) == {"200"}


@pytest.mark.parametrize(
    "odd",
    [
        {"paths": []},
        {"paths": {"/x": 1}},
        {"paths": {"/x": {"get": []}}},
        {"paths": {"/x": {"get": {"parameters": {}}}}},
        {"paths": {"/x": {"get": {"responses": []}}}},
        {"paths": {"/x": {"get": {"responses": {"200": 1}}}}},
        {"paths": {CHAT: {"post": {"requestBody": 1}}}},
        {"components": []},
        {"components": {"schemas": 1}},
    ],
    ids=str,
)
def test_an_odd_document_is_refused(odd: dict) -> None:
    with pytest.raises(ValueError, match="not as OpenAPI"):
        made(odd)


@pytest.mark.asyncio(loop_scope="module")
async def test_it_is_the_engines_once_that_is_ready(own_upstream: Upstream, tmp_path) -> None:
    bodies: list[bytes] = []

    async def engine(http: web.Request) -> web.StreamResponse:
        if http.path != "/openapi.json":
            return await answer(http)
        return web.json_response(body=bodies.pop())

    def serve(document: object) -> None:
        # Each model's engine is asked.
        bodies[:] = [orjson.dumps(document)] * len(alike())

    async def fetched(front) -> tuple[dict, str]:
        async with front.session.get("/openapi.json") as reply:
            assert reply.status == 200
            assert reply.content_type == "application/json"
            return await reply.json(), reply.headers["ETag"]

    own_upstream.handler = engine
    async with running(tmp_path, own_upstream) as front:
        # Neither of them is kept.
        for odd in ("x" * 10, {"paths": 1}):
            serve(odd)
            assert set((await fetched(front))[0]["paths"]) == OWN | set(CACHED_ROUTES)
        serve(engine_document())
        document, etag = await fetched(front)
        assert "/v1/embeddings" in document["paths"]
        # It was asked for once: there is no further body to serve.
        assert await fetched(front) == (document, etag)
        async with front.session.get("/openapi.json", headers={"If-None-Match": etag}) as reply:
            assert (reply.status, await reply.read()) == (304, b"")
        await own_upstream.stop()
        await front.until_ready(503, model="m")
        without, _ = await fetched(front)
        assert set(without["paths"]) == OWN | set(CACHED_ROUTES)
        await own_upstream.start()
        await front.until_ready()
        serve(engine_document(**{"/new": {"get": {"responses": {}}}}))
        assert "/new" in (await fetched(front))[0]["paths"]
        assert bodies == []


@pytest.mark.asyncio(loop_scope="module")
async def test_what_it_says_of_answers_is_true(front, upstream) -> None:
    responses = made(None)["paths"][CHAT]["post"]["responses"]
    asked = question(cache={"tags": ["a"]})
    for _ in range(2):
        async with front.post(asked) as reply:
            always = {*responses["200"]["headers"]} - {"X-Tierserve-Fallback"}
            assert {n.lower() for n in always} <= {n.lower() for n in reply.headers}
            assert orjson.loads(await reply.read())["choices"] == body()["choices"]
    async with front.post(question(cache={"tags": "a"})) as reply:
        assert reply.status == 400
        error = (await reply.json())["error"]
        required = made(None)["components"]["schemas"]["TierserveError"]["properties"]["error"][
            "required"
        ]
        assert set(error) == set(required)


def test_the_field_cache_is_described_as_it_is_read() -> None:
    parts = {}
    for name, part in SCHEMA["properties"].items():
        parts[name], null = part["anyOf"]
        assert null == {"type": "null"}
        assert part["description"]
        assert parse_cache_field({name: None}) == parse_cache_field(None)
    ttl, tags, variants = parts["ttl"], parts["tags"], parts["variants"]
    longest = "x" * tags["items"]["maxLength"]
    right = [{"mode": mode} for mode in parts["mode"]["enum"]]
    right += [{"ttl": ttl["maximum"]}, {"tags": [longest] * tags["maxItems"]}]
    right += [{"variants": variants["minimum"]}, {"variants": variants["maximum"]}]
    for field in right:
        parse_cache_field(field)
    wrong = [{"mode": "other"}, {"other": 1}, {"ttl": ttl["exclusiveMinimum"]}, {"tags": [""]}]
    wrong += [{"ttl": ttl["maximum"] + 1}, {"tags": [longest + "x"]}]
    wrong += [{"tags": ["x"] * (tags["maxItems"] + 1)}, {"variants": variants["minimum"] - 1}]
    wrong += [{"variants": variants["maximum"] + 1}]
    for field in wrong:
        with pytest.raises(BadRequestError):
            parse_cache_field(field)


def test_routes_that_no_engine_has_are_left_out() -> None:
    def summary(*engines: dict | None) -> str | None:
        paths = build_document(engines, kept=CACHED_ROUTES, version="1")["paths"]
        return paths["/rerank"]["post"]["summary"] if "/rerank" in paths else None

    other = {"paths": {"/rerank": {"post": {"responses": {}}}}}
    assert summary() == "Described by the engine, once it is ready"
    assert summary(engine_document()) is None
    assert summary(engine_document(), other) == "Another model's engine describes it"
    assert "perhaps none" in summary(engine_document(), None)
    assert set(made(engine_document())["paths"]) & set(CACHED_ROUTES) == {CHAT, "/v1/embeddings"}
