"""Vectors of the real vLLM with the real model, asked for twice."""

from typing import Any

import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from .conftest import MODEL, Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine_args() -> dict[str, Any]:
    return {"runner": "pooling", "convert": "embed"}


@pytest.fixture(scope="module")
def ready(server: Server) -> Server:
    server.wait_ready()
    return server


@pytest.mark.parametrize("asked", ["A text.", ["One.", "Two."], [504, 314], [[504], [314, 260]]])
@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_embeddings(ready: Server, asked: Any, encoding: str | None) -> None:
    made = []
    for status in ("fwd=miss", "detail=memory"):
        raw = ready.client.embeddings.with_raw_response.create(
            # The client asks for base64, and decodes it, where it is told nothing.
            model=MODEL,
            input=asked,
            encoding_format=encoding or openai.omit,
            extra_body={"cache_salt": str(encoding)},
        )
        assert status in raw.headers["cache-status"]
        made.append(raw.parse())
    first, second = made
    assert first.data == second.data
    assert first.usage == second.usage
    assert len(first.data) == (2 if isinstance(asked[0], list | str) and len(asked) == 2 else 1)
    assert isinstance(first.data[0].embedding, str if encoding == "base64" else list)


def test_vectors_are_the_same_in_each_encoding(ready: Server) -> None:
    create = ready.client.embeddings.create
    asked = {"model": MODEL, "input": "A text in two encodings."}
    floats = create(encoding_format="float", **asked).data[0].embedding
    decoded = create(**asked).data[0].embedding
    assert decoded == pytest.approx(floats, abs=1e-6)


def test_langchains_embeddings(ready: Server) -> None:
    # Else it sends tokens of OpenAI's own tokenizer.
    model = OpenAIEmbeddings(
        base_url=f"{ready.url}/v1",
        api_key="k",
        model=MODEL,
        check_embedding_ctx_length=False,
        http_client=ready.client._client,
    )
    before = ready.metric("/metrics", 'tierserve_tier_hits_total{tier="memory"}')
    first, second = (model.embed_documents(["A document.", "Another."]) for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert ready.metric("/metrics", 'tierserve_tier_hits_total{tier="memory"}') == before + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/pooling", {"input": "A text."}),
        ("/v2/embed", {"texts": ["A text."], "embedding_types": ["float"]}),
        ("/score", {"text_1": "One.", "text_2": ["Two.", "Three."]}),
        ("/rerank", {"query": "One?", "documents": ["Two.", "One."]}),
        ("/tokenize", {"prompt": "A text."}),
    ],
)
def test_other_vectors(ready: Server, path: str, body: dict[str, Any]) -> None:
    made = []
    for status in ("fwd=miss", "detail=memory"):
        response = ready.client._client.post(f"{ready.url}{path}", json={"model": MODEL} | body)
        assert response.status_code == 200, response.text
        assert status in response.headers["cache-status"]
        made.append(response.json())
    first, second = made
    assert first.pop("id", None) != second.pop("id", "") or path == "/tokenize"
    assert {**first, "created": 0} == {**second, "created": 0}


def test_aliases_share_answers(ready: Server) -> None:
    body = {"model": MODEL, "query": "Which?", "documents": ["This.", "That."]}
    for path, status in (("/rerank", "fwd=miss"), ("/v1/rerank", "hit"), ("/v2/rerank", "hit")):
        response = ready.client._client.post(f"{ready.url}{path}", json=body)
        assert status in response.headers["cache-status"]
