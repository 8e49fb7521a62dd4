"""The table of routes: which paths have which property."""

import pytest

from server.protocol.routes import (
    CACHED_ROUTES,
    REFUSED_PATHS,
    Dialect,
    Route,
    is_tenant_allowed,
    route_of,
)

CACHED = {
    "/classify", "/detokenize", "/pooling", "/rerank", "/score", "/tokenize",
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/rerank", "/v1/responses", "/v1/score", "/v2/embed",
    "/v2/rerank",
}  # fmt: skip
SALTED = {
    "/classify", "/generative_scoring", "/invocations", "/pooling", "/rerank", "/score",
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/embeddings",
    "/v1/messages", "/v1/rerank", "/v1/responses", "/v1/score", "/v1/systemone", "/v2/rerank",
}  # fmt: skip
TENANT_ALLOWED = SALTED | {
    "/detokenize", "/ping", "/tokenize", "/tokenizer_info", "/v1/audio/transcriptions",
    "/v1/audio/translations", "/v1/chat/completions/derender", "/v1/chat/completions/render",
    "/v1/completions/derender", "/v1/completions/render", "/v1/messages/count_tokens",
    "/v1/messages/render", "/v1/models", "/v1/realtime", "/v1/responses/render", "/version",
}  # fmt: skip
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
OTHERS = {
    "", "/", "/abort_requests", "/inference/v1/generate", "/load", "/metrics", "/nowhere", "/pause",
    "/v1/files", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
}  # fmt: skip
PATHS = sorted(CACHED | TENANT_ALLOWED | OTHERS)


@pytest.mark.parametrize("path", PATHS)
def test_properties_of_paths(path: str) -> None:
    route = route_of(path)
    assert (path in CACHED_ROUTES) == (path in CACHED)
    assert route.salted == (path in SALTED)
    assert is_tenant_allowed(path) == (path in TENANT_ALLOWED)
    assert route.counts_prompts == (path in SALTED | {"/v1/completions/render"})
    assert route.operation == OPERATIONS.get(path)
    is_anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
    assert (route.dialect is Dialect.ANTHROPIC) == is_anthropic
    is_chat = path in ("/v1/chat/completions", "/v1/chat/completions/batch")
    assert route.is_conversation == is_chat
    assert route.is_refused == (path in REFUSED_PATHS)


def test_a_cached_route_is_the_same_under_each_of_its_paths() -> None:
    for path, route in CACHED_ROUTES.items():
        assert route_of(path) is route
        assert path in route.paths


@pytest.mark.parametrize(
    ("path", "is_allowed"),
    [
        ("/v1/models/m", True),
        ("/v1/models/org/m", True),
        ("/v1/models/a\nb", True),
        ("/v1/models/", False),
        ("/v1/models//m", False),
        ("/v1/models/../pause", False),
        ("/v1/models/./m", False),
        ("/v1/responses/resp_1", True),
        ("/v1/responses/resp_1/cancel", True),
        ("/v1/responses/resp_1/input_items", False),
        ("/v1/responses/../pause", False),
        ("/v1/responses/", False),
        ("/v1/chat/completions/", False),
        ("/v1/messages/batches", False),
        ("//v1/models", False),
    ],
)
def test_paths_with_names_and_ids(path: str, is_allowed: bool) -> None:
    assert is_tenant_allowed(path) is is_allowed


@pytest.mark.parametrize("path", ["/v1/messages/", "/v1/messages/batches", "/v1/messages/a/../b"])
def test_paths_below_messages_are_anthropics(path: str) -> None:
    assert route_of(path).dialect is Dialect.ANTHROPIC
    assert route_of("/v1/messages2").dialect is Dialect.OPENAI


def test_a_path_that_is_not_known_is_for_operators() -> None:
    assert not Route(paths=("/x",)).tenant_allowed
