"""Keys of requests: what can change the answer changes the key, and what can't doesn't."""

from functools import cache

import orjson
import pytest

from server.auth.tenant import open_tenant
from server.engine.vllm_options import engine_keeps_responses
from server.protocol.errors import BadRequestError
from server.protocol.model_names import ModelNames, UnknownModelError
from server.protocol.request import ParsedRequest, parse_request
from tests.server.conftest import of_vllm

CHAT = "/v1/chat/completions"
Headers = tuple[tuple[str, str], ...]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@cache
def names(identity: str) -> ModelNames:
    meanings = {"m": "m", "other": "other", "alias": "m", "poet": "poet"}
    return ModelNames({asked: of_vllm(name, identity) for asked, name in meanings.items()})


def request(body, *, scope: str = "", identity: str = "i", path: str = CHAT) -> ParsedRequest:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return parse_request(path, raw, open_tenant(scope), names(identity))


@pytest.mark.parametrize(
    "change",
    [
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"user": "u"},
        {"metadata": {"a": 1}, "prompt_cache_key": "k", "prompt_cache_retention": "24h"},
        {"safety_identifier": "s", "service_tier": "flex", "store": False},
        {"priority": -3, "request_id": "r", "session_id": "s"},
        {"temperature": 0.0},
        {"model": None},
        {"model": ""},
        {"model": "alias"},
        {"n": 1},
        {"logprobs": False},
        {"max_tokens": None},
        {"messages": [{"content": "hi", "role": "user"}]},
    ],
)
def test_same_key(change) -> None:
    assert request(BODY | change).key == request(BODY).key
    reordered = dict(reversed((BODY | change).items()))
    assert request(orjson.dumps(reordered, option=orjson.OPT_INDENT_2)).key == request(BODY).key


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_body_in_another_encoding_is_read_and_sent_as_utf_8(encoding: str) -> None:
    text = '{"model":"m","messages":[{"role":"user","content":"é"}],"temperature":0}'
    assert request(text.encode(encoding)) == request(text.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"model": "poet"},
        {"model": 0},
        {"model": False},
        {"temperature": 0.5},
        {"seed": 1},
        {"n": 2},
        {"unknown": 1},
        {"logprobs": 0},
        {"tool_choice": None},
        {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        {"messages": [{"role": "user", "content": "hi "}]},
        {"tools": [{"type": "function", "function": {"parameters": {"a": 1, "b": 2}}}]},
        {"tools": [{"type": "function", "function": {"parameters": {"b": 2, "a": 1}}}]},
    ],
)
def test_other_key(change) -> None:
    assert request(BODY | change).key != request(BODY).key


def of_unknown_engine(body, path: str = CHAT, headers: Headers = ()) -> ParsedRequest:
    named = of_vllm("m", "i", is_vllm=False, encodings_agree=False)
    return parse_request(
        path, orjson.dumps(body), open_tenant(""), ModelNames({"m": named}), headers
    )


def claude_code(number: int, **more) -> dict:
    """Return a request as Claude Code sends it, the same but for what it changes each time."""
    marked = {"cache_control": {"type": "ephemeral"}} if number % 2 else {}
    billing = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch=0{number};"
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": bool(number)}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": f"s{number}"}
    return {
        "model": "m",
        "max_tokens": 9,
        "metadata": {"user_id": f"session_{number}"},
        "system": [{"type": "text", "text": billing}, {"type": "text", "text": "Help."} | marked],
        "tools": [{"name": "f", "input_schema": {"type": "object"}} | marked],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"} | marked]},
            {"role": "assistant", "content": [thought, {"type": "tool_use", "id": "t"}]},
            {"role": "user", "content": [result | {"content": [{"type": "text"} | marked]}]},
        ],
    } | more


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_vllm_drops_of_messages_is_not_in_the_key(path: str) -> None:
    one, other = (request(claude_code(number), path=path) for number in (1, 2))
    assert one.key == other.key
    assert orjson.loads(other.body) == claude_code(2)
    keys = {of_unknown_engine(claude_code(number), path).key for number in (1, 2)}
    assert len(keys) == 2
    other = claude_code(2, system=[{"type": "text", "text": "x-anthropic-other: 2"}])
    assert request(other, path=path).key != one.key
    # vLLM refuses a block without a type.
    other["system"] = [{"text": "x-anthropic-billing-header: 2"}]
    assert request(other, path=path).key != one.key


@pytest.mark.parametrize("asked", [None, "", 0])
def test_messages_name_a_model(asked) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = claude_code(1) | {"model": asked}
        assert orjson.loads(request(body, path=path).body)["model"] == asked


def test_headers_count_where_we_do_not_know_who_hears_them() -> None:
    betas = [(("anthropic-beta", beta),) for beta in ("a", "b")]
    assert len({of_unknown_engine(BODY, headers=beta).key for beta in betas}) == 2
    known = {
        parse_request(CHAT, orjson.dumps(BODY), open_tenant(""), names("i"), beta).key
        for beta in betas
    }
    assert known == {request(BODY).key}


@pytest.mark.parametrize(
    "change",
    [
        {"stream": False},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "u"},
        {"metadata": {"a": 1}},
        {"n": 1},
        {"max_tokens": None},
    ],
)
def test_an_engine_that_we_do_not_know_may_hear_anything(change) -> None:
    asked = of_unknown_engine(BODY | change)
    assert asked.key != of_unknown_engine(BODY).key
    assert orjson.loads(asked.body) == BODY | change
    assert asked.wants_usage is (change.get("stream") is True)


@pytest.mark.parametrize(
    ("path", "store", "is_repeatable"),
    [
        (CHAT, None, True),
        (CHAT, True, False),
        ("/v1/responses", None, False),
        ("/v1/responses", False, True),
    ],
)
def test_an_engine_that_we_do_not_know_may_keep_answers(path, store, is_repeatable) -> None:
    body = {"model": "m", "input": "hi", "temperature": 0}
    body |= {} if store is None else {"store": store}
    assert of_unknown_engine(body, path).repeatable is is_repeatable


@pytest.mark.parametrize(
    ("encodings_agree", "more"),
    [
        (False, {}),
        (True, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (True, {"tool_choice": None}),
        (True, {"parallel_tool_calls": False}),
        (True, {"return_token_ids": True}),
    ],
)
def test_forms_are_apart_where_parsers_may_differ(encodings_agree: bool, more: dict) -> None:
    named = ModelNames({"m": of_vllm("m", "i", encodings_agree=encodings_agree)})
    forms = [BODY | more, BODY | more | {"stream": True}, BODY | more | {"stream": False}]
    body, events, explicit = (
        parse_request(CHAT, orjson.dumps(f), open_tenant(""), named).key for f in forms
    )
    assert body == explicit != events


def test_an_engine_may_count_for_everybody() -> None:
    named = ModelNames({"m": of_vllm("m", "i", always_counts_tokens=True)})
    asked = parse_request(CHAT, orjson.dumps(BODY | {"stream": True}), open_tenant(""), named)
    assert (asked.wants_usage, orjson.loads(asked.body)) == (True, BODY | {"stream": True})


def test_order_inside_schemas_is_kept() -> None:
    one = BODY | {"tools": [{"function": {"parameters": {"a": 1, "b": 2}}}]}
    other = BODY | {"tools": [{"function": {"parameters": {"b": 2, "a": 1}}}]}
    assert request(one).key != request(other).key


def test_scope_identity_and_route_are_in_the_key() -> None:
    keys = {
        request(BODY).key,
        request(BODY, scope="s").key,
        request(BODY, identity="j").key,
        request(BODY, path="/v1/completions").key,
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("change", "deterministic"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 1, "seed": 7}, True),
        ({"temperature": 1, "seed": -1}, False),
        ({"temperature": 1}, False),
        ({"temperature": False}, False),
        ({"temperature": "0"}, False),
        ({"temperature": None}, False),
    ],
)
def test_what_is_deterministic(change, deterministic: bool) -> None:
    assert request(BODY | change).deterministic is deterministic


@pytest.mark.parametrize(
    "change",
    [
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"stream_options": {"include_usage": 1}},
        {"stream_options": 3},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://h/a"}}]}]},
        {"messages": [{"content": [{"type": "audio_url", "audio_url": "http://h/a"}]}]},
    ],
)
def test_what_is_not_repeatable(change) -> None:
    assert request(BODY).repeatable
    assert not request(BODY | change).repeatable


def test_media_that_are_sent_along_are_repeatable() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert request(BODY | {"messages": [{"content": [part, "text"]}, 3]}).repeatable


@pytest.mark.parametrize("name", ["prompt_logprobs", "echo", "return_token_ids", "unknown"])
def test_what_may_differ_between_the_forms_is_kept_apart(name: str) -> None:
    one, other = BODY | {name: 1}, BODY | {name: 1, "stream": True}
    assert request(one).key != request(other).key


def test_any_bytes_may_be_a_scope() -> None:
    assert request(BODY, scope="\udcff").key != request(BODY, scope="\udcfe").key


def test_usage_is_always_recorded_from_a_stream() -> None:
    sent = orjson.loads(request(BODY | {"stream": True}).body)
    assert sent["stream_options"] == {"include_usage": True}
    raw = orjson.dumps(BODY)
    assert request(raw).body == raw


def test_huge_integers_are_kept_apart() -> None:
    huge = 12345678901234567890123
    keys = {request(orjson.dumps(BODY)[:-1] + b',"x":%d}' % n).key for n in (huge, huge + 1)}
    assert len(keys) == 2
    streamed = request(orjson.dumps(BODY)[:-1] + b',"stream":true,"x":%d}' % huge)
    assert b"%d" % huge in streamed.body
    assert request(BODY | {"temperature": 1e300}).key != request(BODY | {"temperature": 1e301}).key


def test_deep_bodies_have_keys_or_are_refused() -> None:
    def nested(depth: int) -> bytes:
        return orjson.dumps(BODY)[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}"

    assert request(nested(400)).key != request(nested(401)).key
    with pytest.raises(BadRequestError, match="JSON: depth limit"):
        request(nested(5000))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"\xff", b"1", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}',
        b'{"a": "\\ud800"}', b'{"a": 1}\x00', b"\xef\xbb\xbf{", '{"a": 1'.encode("utf-16"),
        b"{\x00}", b"\xff\xfe{\x00\x00\xd8}\x00",
    ],
)  # fmt: skip
def test_refuses_what_is_not_an_object(raw: bytes) -> None:
    with pytest.raises(BadRequestError, match="the body should be"):
        request(raw)


def test_which_engines_keep_responses() -> None:
    name = "VLLM_ENABLE_RESPONSES_API_STORE"
    assert not engine_keeps_responses(({}, {name: "0"}))
    assert engine_keeps_responses(({}, {name: "1"}))


@pytest.mark.parametrize(
    ("asked", "known_as"), [("m", "m"), ("alias", "m"), ("", "m"), (None, "m"), ("poet", "poet")]
)
def test_the_engine_is_asked_for_what_it_knows(asked: str | None, known_as: str) -> None:
    for stream in (False, True):
        made = request(BODY | {"model": asked, "stream": stream})
        assert made.model == known_as
        assert f"model:{known_as}" in made.labels
        for sent in (made.body, made.raw):
            assert orjson.loads(sent)["model"] == known_as


@pytest.mark.parametrize("asked", [0, 7, False, ["m"], {"m": 1}])
def test_a_model_that_is_no_text_is_the_engines_to_refuse(asked) -> None:
    made = request(BODY | {"model": asked})
    assert made.model == "m"
    assert orjson.loads(made.body)["model"] == asked
    assert made.key != request(BODY).key


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UnknownModelError, match=r"The model `no` does not exist. Valid aliases: m"):
        request(BODY | {"model": "no"})
