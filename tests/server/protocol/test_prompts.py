"""The limit of prompts in a request, on every route whose bodies may have many."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web
from yarl import URL

from tests.server.conftest import CHAT, Front, Upstream, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGE = {"role": "user", "content": "hi"}
PART = {"content": [{"type": "text", "text": "a"}]}
MANY = [
    (path, field, value)
    for paths, field, values in (
        (("/v1/completions", "/v1/completions/render", "/invocations"), "prompt", ("a", [1])),
        (("/v1/completions",), "prompt_embeds", ("YQ==",)),
        ((f"{CHAT}/batch", "/v1/embeddings", "/invocations"), "messages", ([MESSAGE],)),
        (("/v1/embeddings", "/pooling", "/classify"), "input", ("a", [1])),
        (("/v1/embeddings",), "input", ([MESSAGE],)),
        (("/v2/embed",), "texts", ("a",)),
        (("/v2/embed",), "images", ("data:image/png;base64,YQ==",)),
        (("/v2/embed",), "inputs", (PART,)),
        (("/rerank", "/v1/rerank", "/v2/rerank"), "documents", ("a", PART)),
        (("/score", "/invocations"), "documents", ("a", PART)),
        (("/score", "/v1/score"), "queries", ("a", PART)),
        (("/score", "/generative_scoring"), "items", ("a", [1])),
        (("/score", "/invocations"), "data_1", ("a", PART)),
        (("/score",), "data_2", ("a",)),
        (("/score",), "text_1", ("a",)),
        (("/score",), "text_2", ("a",)),
    )
    for path in paths
    for value in values
]  # fmt: skip
ONE = [
    ("/v1/completions", "prompt", [1] * 4),
    ("/v1/embeddings", "input", [MESSAGE] * 4),
    ("/v1/responses", "input", [MESSAGE] * 4),
    (CHAT, "messages", [MESSAGE] * 4),
    ("/invocations", "messages", [MESSAGE] * 4),
    ("/v1/other", "prompt", ["a"] * 4),
]


async def take(http: web.Request) -> web.StreamResponse:
    await http.read()
    return web.json_response({"taken": True})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    sections = {"server": {"max_prompts": 3}}
    async with running(tmp_path_factory.mktemp("prompts"), _upstream, sections=sections) as made:
        yield made


@pytest.mark.parametrize(("path", "field", "value"), MANY)
async def test_a_request_has_so_many_prompts(front, upstream, path, field, value) -> None:
    upstream.handler = take
    for count, status in ((3, 200), (4, 400)):
        async with front.session.post(path, json={field: [value] * count, "for": path}) as reply:
            assert reply.status == status
            refused = await reply.json()
    assert refused["error"]["param"] == field
    assert "at most 3 prompts, not 4" in refused["error"]["message"]
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(("path", "field", "value"), ONE)
async def test_what_is_one_prompt_may_be_long(front, upstream, path, field, value) -> None:
    upstream.handler = take
    async with front.session.post(path, json={field: value}) as reply:
        assert reply.status == 200


async def test_a_conversations_documents_are_part_of_it(front, upstream) -> None:
    upstream.handler = take
    asked = {"messages": [MESSAGE], "documents": [{"text": "a"}] * 4}
    for path, status in ((CHAT, 200), ("/v1/rerank", 400), ("/invocations", 400)):
        async with front.session.post(path, json=asked) as reply:
            # Elsewhere, messages may be a field that means nothing.
            assert reply.status == status


async def test_no_way_of_writing_gets_past_it(front, upstream) -> None:
    upstream.handler = take
    long = b'"' + b"a" * 30_000 + b'"'
    for body in (
        b'{"temperature": NaN, "prompt": ["a", "a", "a", "a"]}',
        b'{"pr\\u006fmpt": ["a", "a", "a", "a"]}',
        b'{"prompt": [' + b",".join([long] * 3 + [b'"a"']) + b"]}",
        b'{"prompt": "a", "prompt": ["a", "a", "a", "a"]}',
    ):
        for path in ("/invocations", "/v1/completions/%72ender"):
            async with front.session.post(URL(front.url + path, encoded=True), data=body) as reply:
                assert reply.status == 400
    assert upstream.asked == []


async def test_what_is_no_json_is_the_engines_to_refuse(front, upstream) -> None:
    upstream.handler = take
    for body in (b"", b"{", b"[" * 3000, b'"x"'):
        async with front.session.post("/invocations", data=body) as reply:
            assert reply.status == 200
    assert len(upstream.asked) == 4
    async with front.session.post("/invocations", data=bytes(100_001)) as reply:
        assert reply.status == 413
