"""Vectors of the real vLLM with the real model, asked for twice."""

from typing import Any

import pytest

from .conftest import MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine_args() -> dict[str, Any]:
    return {"runner": "pooling", "convert": "embed"}


@pytest.fixture(scope="module")
def ready(server: Server) -> Server:
    server.wait_ready()
    return server


@pytest.mark.parametrize("asked", ["A text.", ["One.", "Two."], [504, 314], [[504], [314, 260]]])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(ready: Server, asked: Any, encoding: str) -> None:
    made = []
    for status in ("fwd=miss", "detail=memory"):
        raw = ready.client.embeddings.with_raw_response.create(
            model=MODEL, input=asked, encoding_format=encoding
        )
        assert status in raw.headers["cache-status"]
        made.append(raw.parse())
    first, second = made
    assert first.data == second.data
    assert len(first.data) == (2 if isinstance(asked[0], list | str) and len(asked) == 2 else 1)
    assert first.usage == second.usage
    assert first.id != second.id


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
