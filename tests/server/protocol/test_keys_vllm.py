"""The canonical request against vLLM's own classes: what can change an answer changes the key.

For each field of a request's class some values are made that the class takes, and each has to have
a key of its own, unless `server.protocol.routes` calls the field irrelevant or the value one that
stands for absence. Which these are is compared with the classes, too, so that a field or a default
that a new vLLM brings is noticed. As in `test_convert_vllm`, they take long to import.
"""

import json
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from server.protocol.routes import CACHED_ROUTES
from server.protocol.vllm_fields import without_ignored_fields
from tests.server.protocol.test_keys import CHAT, HELLO, RESPONSES, TEXT, request

pytestmark = pytest.mark.engine


class Made(NamedTuple):
    """A route, the class of its requests in `vllm.entrypoints`, and one of them."""

    path: str
    module: str
    name: str
    body: dict[str, Any]

    def load(self) -> Any:
        return vllm(f"{self.module}.protocol", self.name)


def vllm(module: str, name: str) -> Any:
    """Return what is called so in a module of `vllm.entrypoints`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(import_module(f"vllm.entrypoints.{module}"), name)


def refusals() -> tuple[type[Exception], ...]:
    # It comes with the classes, and slowly.
    from vllm.exceptions import VLLMValidationError

    return ValidationError, VLLMValidationError


CLASSES = [
    Made(CHAT, "openai.chat_completion", "ChatCompletionRequest", HELLO | {"temperature": 0}),
    Made(TEXT, "openai.completion", "CompletionRequest", {"prompt": "hi", "temperature": 0}),
    Made(RESPONSES, "openai.responses", "ResponsesRequest", {"input": "hi", "temperature": 0}),
    Made(
        "/v1/messages",
        "anthropic",
        "AnthropicMessagesRequest",
        HELLO | {"model": "m", "max_tokens": 9},
    ),
    Made(
        "/v1/messages/count_tokens",
        "anthropic",
        "AnthropicCountTokensRequest",
        HELLO | {"model": "m"},
    ),
    Made("/v1/embeddings", "pooling.embed", "EmbeddingCompletionRequest", {"input": "hi"}),
    Made("/v1/embeddings", "pooling.embed", "EmbeddingChatRequest", HELLO),
    Made("/v2/embed", "pooling.embed", "CohereEmbedRequest", {"texts": ["hi"]}),
    Made("/score", "pooling.scoring", "ScoreTextRequest", {"text_1": "hi", "text_2": "ho"}),
    Made("/rerank", "pooling.scoring", "RerankRequest", {"query": "hi", "documents": ["ho"]}),
    Made("/pooling", "pooling.pooling", "PoolingCompletionRequest", {"input": "hi"}),
    Made("/pooling", "pooling.pooling", "PoolingChatRequest", HELLO),
    Made("/classify", "pooling.classify", "ClassificationCompletionRequest", {"input": "hi"}),
    Made("/classify", "pooling.classify", "ClassificationChatRequest", HELLO),
    Made("/tokenize", "serve.tokenize", "TokenizeCompletionRequest", {"prompt": "hi"}),
    Made("/tokenize", "serve.tokenize", "TokenizeChatRequest", HELLO),
    Made("/detokenize", "serve.tokenize", "DetokenizeRequest", {"tokens": [1]}),
]
# Fields that are always in the key: that have no default, or one that is not the same as absence.
KEPT = {
    CHAT: {"add_generation_prompt", "messages", "model", "tool_choice"},
    TEXT: {"model"},
    RESPONSES: {"input", "model", "request_id"},
    "/v1/messages": {"max_tokens", "messages", "model"},
    "/v1/messages/count_tokens": {"messages", "model"},
    "/v1/embeddings": {
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "input", "media_io_kwargs", "messages", "model",
    },
    "/v2/embed": {"images", "inputs", "model", "texts"},
    "/score": {"model", "text_1", "text_2"},
    "/rerank": {"documents", "model", "query"},
    "/tokenize": {
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "media_io_kwargs", "messages", "mm_processor_kwargs", "model",
        "prompt", "tools",
    },
    "/detokenize": {"model", "tokens"},
}  # fmt: skip
KEPT["/classify"] = KEPT["/v1/embeddings"]
KEPT["/pooling"] = KEPT["/v1/embeddings"]
# Classes within which we leave something out, and what they know.
WITHIN = {
    "generate.base.protocol.StreamOptions": {"continuous_usage_stats", "include_usage"},
    "anthropic.protocol.AnthropicMessage": {"content", "role"},
    "anthropic.protocol.AnthropicTool": {
        "defer_loading", "description", "input_schema", "name", "strict",
    },
    "anthropic.protocol.AnthropicContentBlock": {
        "content", "data", "id", "input", "is_error", "name", "signature", "source", "text",
        "thinking", "tool", "tool_name", "tool_use_id", "type",
    },
}  # fmt: skip
# Defaults that are not the same as absence, or not always; see `server.protocol.routes`.
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
    CHAT: _ASKED_BY | {"session_id"},
    TEXT: _ASKED_BY | {"session_id"},
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
    if name in IRRELEVANT.get(path, ()) and isinstance(
        value, CACHED_ROUTES[path].fields.ignored[name]
    ):
        return True
    equal = CACHED_ROUTES[path].fields.defaults.get(name, ())
    return any(value == each and type(value) is type(each) for each in equal)


def values(field: Any) -> Iterator[Any]:
    """Yield what a field takes."""
    of_field = TypeAdapter(field.rebuild_annotation())
    for value in CANDIDATES:
        try:
            of_field.validate_python(value)
        except refusals():
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
    route = CACHED_ROUTES[path]
    fields = [made.load().model_fields for made in CLASSES if made.path == path]
    known = {name for each in fields for name in each}
    takes_any = {name for name, types in route.fields.ignored.items() if types is object}
    assert route.fields.ignored.keys() - takes_any == IRRELEVANT.get(path, set())
    assert route.fields.defaults.keys() <= known
    # What no class knows is taken whatever it is, and nobody reads it.
    assert takes_any == route.fields.ignored.keys() - known
    for name, equal in route.fields.defaults.items():
        for each in fields:
            assert name not in each or default(each[name]) in equal, name


def test_all_routes_are_compared() -> None:
    assert {CACHED_ROUTES[made.path] for made in CLASSES} == set(CACHED_ROUTES.values())


@pytest.mark.parametrize("path", sorted({made.path for made in CLASSES}))
def test_every_field_is_judged(path: str) -> None:
    """A field that a new vLLM brings is kept, until somebody says what it does."""
    known = {name for made in CLASSES if made.path == path for name in made.load().model_fields}
    route = CACHED_ROUTES[path]
    judged = {*route.fields.ignored, *route.fields.defaults, *KEPT[path]}
    assert known - judged == ({"stream"} if route.streams else set())
    assert KEPT[path] <= known


@pytest.mark.parametrize("name", WITHIN)
def test_every_field_is_judged_where_something_is_left_out_within(name: str) -> None:
    module, _, of = name.rpartition(".")
    assert set(vllm(module, of).model_fields) == WITHIN[name]


# What serves the routes whose answers are kept, and what surrounds it.
SERVING = (
    "anthropic", "generate/base", "openai/chat_completion", "openai/completion", "openai/responses",
    "pooling", "serve/engine", "serve/middleware", "serve/tokenize", "serve/utils",
)  # fmt: skip
HEADERS = {
    '"Authorization"', '"X-Request-Id"', '"X-data-parallel-rank"', '"content-type"',
    "ENDPOINT_LOAD_METRICS_FORMAT_HEADER_LABEL", "PRIORITY_HEADER", "SESSION_ID_HEADER",
}  # fmt: skip


def test_no_query_is_read_and_no_other_header() -> None:
    (entrypoints,) = import_module("vllm.entrypoints").__path__
    files = [file for each in SERVING for file in Path(entrypoints, each).rglob("*.py")]
    sources = "".join(file.read_text() for file in files)
    assert not re.search(r"\.query_params|query_string|\bQuery\(", sources)
    assert set(re.findall(r"headers(?:\.get(?:list)?\(|\[)\s*([\w\"-]+)", sources)) == HEADERS


EDGES = (
    None, True, False, 0, 1, 2, 16, -1, 0.0, -0.0, 1.0, 2.0, 16.0, 0.5, 2**31, 2**53, 2.0**53,
    2**53 + 2, 2.0**53 + 2, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2.0**63, 10**19, 1e19, 2**70,
    2.0**70, 1e30, "", "x", "1", "true", "x" * 2000, "float", "tensors", "auto", "disabled", "END",
    "native", "float32", [], ["x"], [1], [1.0], {}, {"x": 1}, {"x": None}, {"5": 1, "05": 2},
    {"05": 2, "5": 1}, {"5": 1, "6": 2}, {"6": 2.0, "5": 1}, {"include_usage": True},
    {"include_usage": False}, {"continuous_usage_stats": True}, {"x": True},
    {"include_usage": True, "continuous_usage_stats": True},
)  # fmt: skip


def understood(made: Made, body: dict[str, Any]) -> dict[str, Any] | None:
    """Return what vLLM makes of the fields that count; `None` if it refuses the body."""
    route = CACHED_ROUTES[made.path]
    try:
        # As it comes there: validators change what they are given.
        fields = made.load().model_validate(json.loads(request(made.path, body).raw))
    except (*refusals(), AttributeError, TypeError):
        return None
    uncounted = {*route.fields.ignored, "request_id", "stream", "stream_options"}
    return {
        name: value
        for name, value in fields.model_dump(warnings=False).items()
        # Their iterators differ, and what becomes of messages is tested elsewhere.
        if name not in (*uncounted, "messages") and value not in route.fields.defaults.get(name, ())
    }


def agree(made: Made, bodies: list[dict[str, Any]]) -> None:
    """Assert that bodies with the same key are understood alike."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for body in bodies:
        by_key.setdefault(request(made.path, body).key, []).append(body)
    for first, *rest in by_key.values():
        for other in rest:
            assert understood(made, first) == understood(made, other), (first, other)


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.name)
def test_what_has_one_key_is_refused_or_taken_alike(made: Made) -> None:
    ignored = CACHED_ROUTES[made.path].fields.ignored
    for name in {*made.load().model_fields, *ignored} - {"model", "messages"}:
        agree(made, [made.body, *(made.body | {name: value} for value in EDGES)])


@pytest.mark.parametrize("made", CLASSES[:4], ids=lambda made: made.name)
def test_what_has_one_key_is_refused_or_taken_alike_whatever_else_it_says(made: Made) -> None:
    route = CACHED_ROUTES[made.path]
    names = sorted({*made.load().model_fields, *route.fields.ignored} - {"messages"})
    drawn_fields = st.dictionaries(
        st.sampled_from(names) | st.sampled_from(["stream", "stream_options"]),
        st.sampled_from(EDGES),
        max_size=3,
    ).map(lambda more: made.body | more | {"model": "m"})

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(drawn_fields)
    def tried(body: dict[str, Any]) -> None:
        less = [{n: v for n, v in body.items() if n != name or n in made.body} for name in body]
        forms = [body | {"stream": stream} for stream in (True, False, None)]
        floats = {n: float(v) for n, v in body.items() if type(v) is int and abs(v) < 2**70}
        agree(made, [body, body | floats, *less, *(forms if route.streams else ())])

    tried()


MARKS: dict[str, list[Any]] = {
    "cache_control": [{"type": "ephemeral", "ttl": "1h"}, None, 3],
    "is_error": [True, False, None],
    "signature": ["s", None],
}
HEADER = "x-anthropic-billing-header: cc_version=2.1; cch=1;"


def marks() -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.sampled_from(values) for name, values in MARKS.items()}


TEXTS = st.sampled_from([HEADER, f"{HEADER} cch=2;\nMore.", f" {HEADER}", "Be brief.", "", None])
LEAVES = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "tool_reference"]), "text": TEXTS},
    optional={"tool_name": st.just("f"), "source": st.just({"data": "AA"}), **marks()},
)
BLOCKS = st.fixed_dictionaries(
    # Without an id it would be the time.
    {
        "type": st.sampled_from(["text", "thinking", "tool_use", "tool_result"]),
        "id": st.just("i"),
    },
    optional={
        "text": TEXTS, "thinking": st.just("Hm."), "tool_use_id": st.just("i"),
        "name": st.just("f"), "input": st.just({"cache_control": 1, "signature": "s"}),
        "content": st.just("x") | st.lists(LEAVES, max_size=2), **marks(),
    },
)  # fmt: skip
CONTENTS = st.sampled_from([HEADER, "x"]) | st.lists(BLOCKS, max_size=2)
TOOLS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]), "input_schema": st.just({"cache_control": {}})},
    optional={"strict": st.booleans(), **marks()},
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": CONTENTS},
    optional=marks(),
)


MARKED = {"type": "text", "text": "x", "cache_control": {}}
# What is refused, and where it counts.
ODD = [
    {"system": [{"type": "text", "text": HEADER} | odd]}
    for odd in ({}, {"type": "x"}, {"source": 3}, {"cache_control": 3}, {"is_error": "x"})
] + [
    {"messages": [{"role": role, "content": [{"type": "tool_result", "content": [MARKED]} | odd]}]}
    for role in ("assistant", "system", "user")
    for odd in (
        {}, {"is_error": "no"}, {"is_error": "x"}, {"is_error": 1}, {"signature": 3},
        {"type": "text", "text": "x"},
    )
] + [
    {"messages": [{"role": role, "content": [{"type": "text", "text": HEADER}, MARKED]}]}
    for role in ("assistant", "system", "user")
]  # fmt: skip


@pytest.mark.parametrize("made", CLASSES[3:5], ids=lambda made: made.name)
def test_what_is_not_heard_of_messages_is_not_in_their_chat(made: Made) -> None:
    converted = vllm("anthropic.serving", "AnthropicServingMessages").to_chat_completion_request

    def chat(body: dict[str, Any], *, merges: bool) -> dict[str, Any] | None:
        try:
            asked = made.load().model_validate(json.loads(json.dumps(body)))
            made_of_it = converted(asked, merge_inline_system=merges)
        except refusals():
            return None
        return made_of_it.model_dump(exclude={"request_id"}, warnings=False)

    def tried(body: dict[str, Any], merges: bool) -> bool:
        left = without_ignored_fields(body)
        assert chat(body, merges=merges) == chat(left, merges=merges), body
        assert without_ignored_fields(left) == left
        return left != body and chat(body, merges=merges) is not None

    for odd in ODD:
        tried(made.body | odd, merges=False)
    taken = 0

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(
        st.fixed_dictionaries(
            {"messages": st.lists(TURNS, min_size=1, max_size=2)},
            optional={"system": CONTENTS, "tools": st.lists(TOOLS, max_size=2), **marks()},
        ),
        st.booleans(),
    )
    def any_is_tried(body: dict[str, Any], merges: bool) -> None:
        nonlocal taken
        taken += tried(made.body | body, merges)

    any_is_tried()
    assert taken > 50
