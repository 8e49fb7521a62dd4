"""Canonical requests: what can change an answer changes the key, and what can't doesn't.

`test_keys_vllm` compares the fields with vLLM's own classes.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.auth.tenant import open_tenant
from server.protocol.model_names import ModelNames
from server.protocol.request import ParsedRequest, parse_request
from server.protocol.routes import CACHED_ROUTES
from tests.server.conftest import of_vllm

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MODELS = ModelNames({"m": of_vllm("m")})
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def request(path: str, body: dict[str, Any] | bytes) -> ParsedRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request(path, raw, open_tenant(""), MODELS)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
BOTH = {"stream_options": {"continuous_usage_stats": True, "include_usage": True}}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
FIELDS = CACHED_ROUTES[CHAT].fields
STRICT = "thinking_token_budget"
KNOWN = sorted({*FIELDS.defaults, *FIELDS.ignored, *FIELDS.same_in_both_encodings, "stream"})
NAMES = st.sampled_from(KNOWN) | TEXTS.filter(lambda name: name != "cache")
BODIES = st.dictionaries(NAMES, JSON, max_size=6).map(
    # No other model is there.
    lambda body: body | {"model": "m"} if isinstance(body.get("model"), str) else body
)


def reordered(body: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(body.items()))


@settings(max_examples=300)
@given(BODIES, st.booleans())
def test_how_it_is_written_changes_nothing(body: dict[str, Any], escapes: bool) -> None:
    one = json.dumps(body).encode()
    # Other order, other whitespace, other escapes, and 1.0 for 1 where vLLM takes either.
    other = {
        name: float(value) if name != STRICT and _is_exact(value) else value
        for name, value in reordered(body).items()
    }
    written = json.dumps(other, indent=3, ensure_ascii=escapes).encode()
    assert request(CHAT, one).key == request(CHAT, written).key


@settings(max_examples=300)
@given(BODIES, BODIES)
def test_what_is_left_differs_where_keys_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two bodies share a key only if they differ in nothing but what may be left out."""
    if request(CHAT, _dumped(one)).key == request(CHAT, _dumped(other)).key:
        assert _relevant(one) == _relevant(other)


def _is_exact(value: Any) -> bool:
    return type(value) is int and abs(value) <= 2**53


def _dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _relevant(body: dict[str, Any]) -> str:
    ignored = set(FIELDS.ignored) | set(FIELDS.defaults) | {"stream", "stream_options", "model"}
    return json.dumps({n: _number(v) for n, v in body.items() if n not in ignored}, sort_keys=True)


def _number(value: Any) -> Any:
    is_whole = isinstance(value, float) and value.is_integer() and _is_exact(int(value))
    return int(value) if is_whole else value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"prompt":"b","prompt":"a"}', b'{"prompt":"a"}'),
        (b'{"prompt":"\\u0061"}', b'{"prompt":"a"}'),
        (b'{"prompt":"\\ud83c\\udf88"}', '{"prompt":"🎈"}'.encode()),
        (b'{"top_p":0.5}', b'{"top_p":5e-1}'),
        (b'{"logit_bias":{"5":1,"6":2.5}}', b'{"logit_bias":{"6":2.5,"5":1.0}}'),
    ],
)
def test_the_same_in_other_words(one: bytes, other: bytes) -> None:
    assert request(TEXT, one).key == request(TEXT, other).key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": 1}, {"x": True}),
        ({"x": 0}, {"x": False}),
        ({"x": None}, {}),
        ({"x": [1, 2]}, {"x": [2, 1]}),
        ({"x": {"a": 1}}, {"x": {"a": 1.5}}),
        ({"n": True}, {}),
        ({"echo": 0}, {}),
        ({"stop": ""}, {}),
        ({"tools": []}, {}),
        ({"stream": 1}, {"stream": True}),
        ({"stream": 1}, {}),
        ({STRICT: 1}, {STRICT: 1.0}),
        ({"max_tokens": 10**19}, {"max_tokens": 1e19}),
        ({"priority": 2**63}, {}),
        ({"priority": -(2**63) - 1}, {}),
        ({"priority": 1e30}, {}),
        ({"priority": 0.5}, {}),
        ({"logit_bias": {"5": 1, "05": 2}}, {"logit_bias": {"05": 2, "5": 1}}),
        ({"stream_options": {"continuous_usage_stats": True}}, {"stream": True} | BOTH),
        ({"stream_options": {"include_usage": True}}, {}),
        (
            {"stream": None, "stream_options": {"x": 1}},
            {"stream": True, "stream_options": {"x": 1}},
        ),
        ({"verbosity": "low"}, {}),
    ],
)
def test_alike_but_not_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert request(CHAT, HELLO | one).key != request(CHAT, HELLO | other).key


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, {"input": [{"content": [{"type": "input_image", "file_id": "f"}]}]}),
        (RESPONSES, {"input": [{"content": [{"type": "input_image", "image_url": "http://h"}]}]}),
        (RESPONSES, {"input": [{"content": [{"type": "input_file", "file_url": "http://h"}]}]}),
        (RESPONSES, {"input": [{"id": "msg_1"}]}),
        (RESPONSES, {"input": [{"output": [{"image_url": "http://h"}]}]}),
        ("/v1/messages", {"messages": [{"content": [{"source": {"type": "url", "url": "http"}}]}]}),
        ("/v1/messages", {"messages": [{"content": [{"source": {"file_id": "f"}}]}]}),
        (
            "/v1/messages",
            {"messages": [{"content": [{"content": [{"source": {"url": "http://h"}}]}]}]},
        ),
        (CHAT, {"messages": [{"content": [{"image_url": None, "uuid": "u"}]}]}),
        (CHAT, {"messages": [{"content": [{"image_url": {"url": "data:,x"}, "uuid": "u"}]}]}),
        ("/v1/embeddings", {"input": [[{"content": [{"image_url": {"url": "http://h"}}]}]]}),
        ("/score", {"text_1": {"content": [{"image_url": {"url": "file:///h"}}]}}),
    ],
)
def test_media_elsewhere_are_not_repeatable(path: str, body: dict[str, Any]) -> None:
    assert not request(path, body).repeatable


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, {"input": [{"content": [{"image_url": "data:image/png;base64,AA"}]}]}),
        (RESPONSES, {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}),
        (RESPONSES, {"tools": [{"type": "function", "name": "f"}]}),
        (
            "/v1/messages",
            {"messages": [{"content": [{"source": {"type": "base64", "data": "A"}}]}]},
        ),
        (
            "/v1/messages",
            {"messages": [{"content": [{"type": "tool_use", "input": {"url": "http://h"}}]}]},
        ),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}),
    ],
)
def test_what_is_sent_along_is_repeatable(path: str, body: dict[str, Any]) -> None:
    assert request(path, body).repeatable
