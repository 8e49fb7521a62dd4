"""The canonical request against vLLM's own classes: what can change an answer changes the key.

For each field of a request's class some values are made that the class takes, and each has to have
a key of its own, unless `server.routes` calls the field irrelevant or the value one that stands for
absence. Which these are is compared with the classes, too, so that a field or a default that a new
vLLM brings is noticed. As in `test_convert_vllm`, they take long to import.
"""

import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from server.routes import ROUTES

from .test_keys import CHAT, RESPONSES, SAID, TEXT, request

pytestmark = pytest.mark.engine


class Made(NamedTuple):
    """A route, the class of its requests in `vllm.entrypoints`, and one of them."""

    path: str
    module: str
    name: str
    body: dict[str, Any]

    def load(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = import_module(f"vllm.entrypoints.{self.module}.protocol")
        return getattr(module, self.name)


CLASSES = [
    Made(CHAT, "openai.chat_completion", "ChatCompletionRequest", SAID | {"temperature": 0}),
    Made(TEXT, "openai.completion", "CompletionRequest", {"prompt": "hi", "temperature": 0}),
    Made(RESPONSES, "openai.responses", "ResponsesRequest", {"input": "hi", "temperature": 0}),
    Made(
        "/v1/messages",
        "anthropic",
        "AnthropicMessagesRequest",
        SAID | {"model": "m", "max_tokens": 9},
    ),
    Made(
        "/v1/messages/count_tokens",
        "anthropic",
        "AnthropicCountTokensRequest",
        SAID | {"model": "m"},
    ),
    Made("/v1/embeddings", "pooling.embed", "EmbeddingCompletionRequest", {"input": "hi"}),
    Made("/v1/embeddings", "pooling.embed", "EmbeddingChatRequest", SAID),
    Made("/v2/embed", "pooling.embed", "CohereEmbedRequest", {"texts": ["hi"]}),
    Made("/score", "pooling.scoring", "ScoreTextRequest", {"text_1": "hi", "text_2": "ho"}),
    Made("/rerank", "pooling.scoring", "RerankRequest", {"query": "hi", "documents": ["ho"]}),
    Made("/pooling", "pooling.pooling", "PoolingCompletionRequest", {"input": "hi"}),
    Made("/pooling", "pooling.pooling", "PoolingChatRequest", SAID),
    Made("/classify", "pooling.classify", "ClassificationCompletionRequest", {"input": "hi"}),
    Made("/classify", "pooling.classify", "ClassificationChatRequest", SAID),
    Made("/tokenize", "serve.tokenize", "TokenizeCompletionRequest", {"prompt": "hi"}),
    Made("/tokenize", "serve.tokenize", "TokenizeChatRequest", SAID),
    Made("/detokenize", "serve.tokenize", "DetokenizeRequest", {"tokens": [1]}),
]
# Defaults that are not the same as absence, or not always; see `server.routes`.
NOT_ABSENCE = {
    CHAT: {"add_generation_prompt", "tool_choice"},
    "/tokenize": {
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "media_io_kwargs", "mm_processor_kwargs", "tools",
    },
    # Which kind of prompt it is decides about them.
    "/v1/embeddings": {
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "media_io_kwargs",
    },
    # Exactly one of them has to be there.
    "/v2/embed": {"images", "inputs", "texts"},
}  # fmt: skip
NOT_ABSENCE["/pooling"] = NOT_ABSENCE["/classify"] = NOT_ABSENCE["/v1/embeddings"]
_ASKED_BY = {"priority", "request_id", "user"}
IRRELEVANT = {
    CHAT: _ASKED_BY | {"metadata", "session_id"},
    TEXT: _ASKED_BY | {"metadata", "session_id"},
    RESPONSES: {"priority", "prompt_cache_key", "session_id", "store"},
    "/v1/messages": {"metadata"},
    "/v1/embeddings": _ASKED_BY,
    "/v2/embed": {"priority"},
    "/score": _ASKED_BY,
    "/rerank": _ASKED_BY,
    "/pooling": _ASKED_BY,
    "/classify": _ASKED_BY,
}
CANDIDATES: list[Any] = [
    True, False, 1, 2, 3.5, "x", ["x"], [7], [[7]], {"x": 1}, {"x": "y"}, [{"x": "y"}],
    "low", "left", "max_length", "base64", "float16", "big", "START", "none", "required", "auto",
    "default", ["float"], ["message.output_text.logprobs"], {"effort": "low"}, "embed",
    {"type": "json_object"}, {"type": "disabled"}, {"type": "auto"}, {"regex": "a"},
    {"format": {"type": "json_object"}}, {"image": {"x": 1}}, {"include_usage": True},
    {"max_pattern_size": 3, "min_count": 2}, [{"content": [{"type": "text", "text": "x"}]}],
    [{"type": "function", "function": {"name": "f"}}], [{"type": "function", "name": "f",
      "parameters": {}, "strict": True}], [{"name": "f", "input_schema": {}}],
    [{"role": "user", "content": "x"}], {"type": "function", "function": {"name": "f"}},
    {"id": "p"},
]  # fmt: skip


def default(field: Any) -> Any:
    return [] if field.default_factory is list else field.default


def may_be_left_out(path: str, name: str, value: Any) -> bool:
    if name in IRRELEVANT.get(path, ()) and isinstance(value, ROUTES[path].irrelevant[name]):
        return True
    equal = ROUTES[path].defaults.get(name, ())
    return any(value == each and type(value) is type(each) for each in equal)


def values(field: Any) -> Iterator[Any]:
    """Yield what a field takes."""
    # It comes with the classes, and slowly.
    from vllm.exceptions import VLLMValidationError

    of_field = TypeAdapter(field.rebuild_annotation())
    for value in CANDIDATES:
        try:
            of_field.validate_python(value)
        except (ValidationError, VLLMValidationError):
            continue
        yield value


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.name)
def test_every_value_of_a_field_has_a_key_of_its_own(made: Made) -> None:
    path, body = made.path, made.body
    plain = request(path, body).key
    for name, field in made.load().model_fields.items():
        if name in ("stream", "model"):
            # They are about the form, and which model there is, as other tests say.
            continue
        taken = [value for value in values(field) if body.get(name) != value]
        assert taken or name == "previous_input_messages", name
        keys = {plain: None}
        for value in taken:
            key = request(path, body | {name: value}).key
            if may_be_left_out(path, name, value):
                assert key == plain, (name, value)
            else:
                assert key not in keys, (name, value, keys.get(key))
                keys[key] = value


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.name)
def test_defaults_written_out_change_nothing(made: Made) -> None:
    path, body = made.path, made.body
    plain, checked = request(path, body).key, 0
    for name, field in made.load().model_fields.items():
        value = default(field)
        if value is not PydanticUndefined and name not in body:
            same = request(path, body | {name: value}).key == plain
            assert same is (name not in NOT_ABSENCE.get(path, ())), (name, value)
            checked += 1
    assert checked


@pytest.mark.parametrize("path", sorted({made.path for made in CLASSES}))
def test_nothing_is_left_out_that_no_class_has(path: str) -> None:
    route = ROUTES[path]
    fields = [made.load().model_fields for made in CLASSES if made.path == path]
    known = {name for each in fields for name in each}
    assert route.irrelevant.keys() == IRRELEVANT.get(path, set())
    assert route.defaults.keys() <= known
    # vLLM doesn't know the `metadata` of chats.
    assert route.irrelevant.keys() - known <= {"metadata"}
    for name, equal in route.defaults.items():
        for each in fields:
            assert name not in each or default(each[name]) in equal, name


def test_all_routes_are_compared() -> None:
    assert {ROUTES[made.path] for made in CLASSES} == set(ROUTES.values())


@pytest.mark.parametrize("path", sorted({made.path for made in CLASSES}))
def test_irrelevant_fields_of_another_type_are_kept(path: str) -> None:
    for name in ROUTES[path].irrelevant:
        if name != "metadata" or path == "/v1/messages":
            assert request(path, SAID | {name: [1]}).key != request(path, SAID).key
