"""Either form out of the other, and what counts as finished."""

import orjson
import pytest

from server import convert
from server.shapes import are_finished
from tiers import Answer, Form

CALL = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def body_of(message, **more) -> dict:
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    return head | {"choices": [choice], "usage": {"total_tokens": 3}} | more


def rendered(content: bytes) -> bytes:
    return convert.fill(content, b"new", 7)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "hi\n\nthere"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "hi", "reasoning": "since"},
        {"role": "assistant", "content": "hi", "reasoning_content": "since", "x": [{"y": 1}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"id": "call-2"}]},
    ],
)
def test_a_body_survives_becoming_events(message) -> None:
    body = Answer(Form.BODY, convert.template(body_of(message)))
    events = convert.as_form(body, Form.EVENTS)
    again = orjson.loads(rendered(convert.as_form(events, Form.BODY).content))
    assert again["choices"][0]["message"] == message
    assert again["choices"][0]["finish_reason"] == "stop"
    assert again["usage"] == {"total_tokens": 3}
    assert (again["id"], again["created"], again["object"]) == ("new", 7, "chat.completion")


def test_only_the_outer_id_and_created_are_fresh() -> None:
    inner = {"role": "assistant", "content": '"id":"x","created":1', "tool_calls": [CALL]}
    parsed = body_of(inner)
    made = orjson.loads(rendered(convert.template(parsed)))
    assert made == parsed | {"id": "new", "created": 7}


def test_what_looks_like_a_mark_in_a_text_is_none() -> None:
    content = b'{"id":"\x00","created":\x01,"x":"\\u0000"}'
    assert convert.fill(content, b"abc", 5) == b'{"id":"abc","created":5,"x":"\\u0000"}'


def test_text_completions_join() -> None:
    chunks = [
        {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
        for choice in (
            {"index": 1, "text": "b", "logprobs": {"tokens": ["b"]}, "finish_reason": "stop"},
            {"index": 0, "text": "a", "logprobs": {"tokens": ["a"]}, "finish_reason": None},
            {"index": 0, "text": "c", "logprobs": {"tokens": ["c"]}, "finish_reason": "length"},
        )
    ]
    answer = Answer(Form.EVENTS, b"".join(map(convert.event, chunks)))
    first, second = orjson.loads(rendered(convert.as_form(answer, Form.BODY).content))["choices"]
    assert (first["text"], first["logprobs"]["tokens"]) == ("ac", ["a", "c"])
    assert (first["finish_reason"], second["text"]) == ("length", "b")


def chat_events(*deltas: dict) -> Answer:
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    *unfinished, last = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices = [*unfinished, last | {"finish_reason": "stop"}]
    events = [convert.event(head | {"choices": [choice]}) for choice in choices]
    return Answer(Form.EVENTS, b"".join(events))


def test_every_text_of_a_delta_is_joined() -> None:
    call = {"function": {"name": "f", "arguments": "{"}, "id": "call-1"}
    answer = chat_events(
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "think", "content": None},
        {"tool_calls": [call]},
        {"tool_calls": [{"function": {"arguments": "}", "strict": None}}]},
        {"content": "y"},
    )
    body = orjson.loads(rendered(convert.as_form(answer, Form.BODY).content))
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "y",
        "reasoning_content": "Let me think",
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    }


def test_what_is_said_of_tokens_is_joined_choice_by_choice() -> None:
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    none = {"delta": {}, "logprobs": None, "token_ids": None, "finish_reason": None}
    said = {0: ["a", "b", "c"], 1: ["d", "e"]}
    choices = [none | {"index": index, "delta": {"role": "assistant"}} for index in said]
    for index, token in ((0, "a"), (1, "d"), (0, "b"), (1, "e"), (0, "c")):
        logprobs = {"content": [{"token": token}]}
        choices.append(none | {"index": index, "logprobs": logprobs, "token_ids": [ord(token)]})
    for index in said:
        last = {"logprobs": {"content": []}, "token_ids": [], "finish_reason": "stop"}
        choices.append(none | {"index": index} | last)
    events = b"".join(convert.event(head | {"choices": [choice]}) for choice in choices)
    body = orjson.loads(rendered(convert.as_form(Answer(Form.EVENTS, events), Form.BODY).content))
    for choice in body["choices"]:
        tokens = said[choice["index"]]
        assert [each["token"] for each in choice["logprobs"]["content"]] == tokens
        assert choice["token_ids"] == list(map(ord, tokens))
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "answer",
    [
        Answer(Form.EVENTS, b""),
        Answer(Form.EVENTS, b'data: {"choices":[{"delta":{}}]}\n\n'),
        Answer(Form.EVENTS, b'data: {"choices":[{"index":0,"delta":null}]}\n\n'),
        Answer(Form.BODY, b'{"choices":[]}'),
        Answer(Form.BODY, b'{"choices":[{"index":0,"message":{}}],"object":"x"}'),
        Answer(Form.BODY, b"[]"),
    ],
)
def test_what_has_no_other_form_is_said(answer: Answer) -> None:
    other = Form.BODY if answer.form is Form.EVENTS else Form.EVENTS
    with pytest.raises(convert.NotConvertibleError):
        convert.as_form(answer, other)


def test_the_fingerprint_is_where_vllm_puts_it() -> None:
    body = Answer(
        Form.BODY,
        convert.template(body_of({"role": "assistant", "content": "hi"}, system_fingerprint="fp")),
    )
    events = convert.as_form(body, Form.EVENTS)
    for wants_usage in (False, True):
        content = convert.counted(events.content, wants_usage=wants_usage)
        chunks = [orjson.loads(rendered(part)[6:]) for part in content.split(b"\n\n") if part]
        fingerprints = [chunk.get("system_fingerprint") for chunk in chunks]
        assert fingerprints == [None, None if wants_usage else "fp"]
    assert orjson.loads(rendered(events.usage)[6:])["system_fingerprint"] == "fp"
    again = orjson.loads(rendered(convert.as_form(events, Form.BODY).content))
    assert again["system_fingerprint"] == "fp"


@pytest.mark.parametrize(
    ("reasons", "finished"),
    [
        (["stop"], True),
        (["stop", "length"], True),
        ([], False),
        ([None], False),
        (["stop", None], False),
        (["abort"], False),
        (["error"], False),
    ],
)
def test_what_is_finished(reasons, finished: bool) -> None:
    assert are_finished([{"finish_reason": reason} for reason in reasons]) is finished
