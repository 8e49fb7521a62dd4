"""Either form out of the other, and what counts as finished."""

from functools import partial

import orjson
import pytest

from server.protocol import convert, template
from server.protocol.formats import Encoding, are_finished
from tiers import Answer

HEAD = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
CHUNK = HEAD | {"object": "chat.completion.chunk"}
TEXT = HEAD | {"object": "text_completion"}
USAGE = {"prompt_tokens": 1, "total_tokens": 3, "completion_tokens": 2}
COUNTS = {"choices": [], "usage": USAGE}
CALL = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TOKEN = {"token": "hi", "logprob": -0.5, "bytes": [104, 105], "top_logprobs": []}
MESSAGE = {"role": "assistant", "content": "hi"}
ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
HI = {"index": 0, "delta": {"content": "hi"}, "finish_reason": None}
END = {"index": 0, "delta": {}, "finish_reason": "stop"}


def body_of(message=MESSAGE, /, *, choice=None, **more) -> Answer:
    made = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    parsed = HEAD | {"choices": [made | (choice or {})], "usage": USAGE} | more
    return Answer(Encoding.JSON, template.json_template(parsed))


def events_of(*choices: dict, counts=COUNTS, head=CHUNK, **more) -> Answer:
    chunks = [head | {"choices": [choice]} | more for choice in choices]
    return Answer(
        Encoding.SSE,
        b"".join(map(template.sse_event, chunks)),
        template.sse_event(head | counts | more),
    )


def rendered(content: bytes) -> bytes:
    return template.fill_marks(content, b"new", 7)


def body_made_of(answer: Answer) -> dict:
    return orjson.loads(rendered(convert.convert(answer, Encoding.JSON).content))


@pytest.mark.parametrize("text", ["hi\n\nthere", ""])
def test_a_body_survives_becoming_events(text: str) -> None:
    message = {"role": "assistant", "content": text}
    events = convert.convert(body_of(message, system_fingerprint="fp"), Encoding.SSE)
    again = body_made_of(events)
    (choice,) = again["choices"]
    # The rest is there as null, as vLLM has it.
    assert {
        name: value for name, value in choice["message"].items() if value is not None
    } == message
    assert (choice["message"]["refusal"], choice["finish_reason"]) == (None, "stop")
    assert (again["usage"], again["service_tier"]) == (
        USAGE | {"prompt_tokens_details": None, "completion_tokens_details": None},
        None,
    )
    assert (again["id"], again["created"], again["object"]) == ("new", 7, "chat.completion")
    assert again["system_fingerprint"] == "fp"
    assert convert.convert(convert.convert(events, Encoding.JSON), Encoding.SSE) == events


def test_only_the_outer_id_and_created_are_fresh() -> None:
    inner = {"role": "assistant", "content": '"id":"x","created":1', "tool_calls": [CALL]}
    parsed = HEAD | {"choices": [{"message": inner}]}
    made = orjson.loads(rendered(template.json_template(parsed)))
    assert made == parsed | {"id": "new", "created": 7}


def test_what_looks_like_a_mark_in_a_text_is_none() -> None:
    content = b'{"id":"\x00","created":\x01,"x":"\\u0000"}'
    assert template.fill_marks(content, b"abc", 5) == b'{"id":"abc","created":5,"x":"\\u0000"}'


def test_text_completions_join() -> None:
    def part(index: int, text: str, reason: str | None) -> dict:
        logprobs = {"tokens": [text], "text_offset": [0], "token_logprobs": [-1.0]}
        logprobs["top_logprobs"] = [{text: -1.0}]
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    answer = events_of(part(1, "b", "stop"), part(0, "a", None), part(0, "c", "length"), head=TEXT)
    first, second = body_made_of(answer)["choices"]
    assert (first["text"], first["logprobs"]["tokens"]) == ("ac", ["a", "c"])
    assert (first["finish_reason"], second["text"]) == ("length", "b")


def test_what_is_said_of_tokens_is_joined_choice_by_choice() -> None:
    tokens_of = {0: ["a", "b", "c"], 1: ["d", "e"]}
    choices = [ROLE | {"index": index} for index in tokens_of]
    for index, token in ((0, "a"), (1, "d"), (0, "b"), (1, "e"), (0, "c")):
        logprobs = {"content": [TOKEN | {"token": token}]}
        choices.append(HI | {"index": index, "delta": {"content": token}, "logprobs": logprobs})
    choices += [END | {"index": index, "logprobs": {"content": []}} for index in tokens_of]
    for choice in body_made_of(events_of(*choices))["choices"]:
        tokens = tokens_of[choice["index"]]
        assert choice["message"]["content"] == "".join(tokens)
        assert [each["token"] for each in choice["logprobs"]["content"]] == tokens
        assert choice["finish_reason"] == "stop"


def with_delta(**delta) -> dict:
    return {"index": 0, "delta": delta, "finish_reason": None}


chat = partial(events_of, ROLE)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(Encoding.SSE, b""),
        Answer(Encoding.SSE, b"", template.sse_event(CHUNK | COUNTS)),
        # No role, none with its text, or two.
        events_of(HI, END),
        events_of(ROLE | {"delta": MESSAGE}, END),
        chat(ROLE, END),
        # No end, two, or none yet.
        chat(HI),
        chat(END, END),
        chat(END, HI),
        chat(HI, HI | {"stop_reason": 7}, END),
        # Choices that are missing, of no number, or several at once.
        events_of(ROLE | {"index": 1}, END | {"index": 1}),
        events_of({name: ROLE[name] for name in ("delta",)}, END),
        Answer(
            Encoding.SSE,
            template.sse_event(CHUNK | {"choices": [ROLE, ROLE | {"index": 1}]}),
            template.sse_event(CHUNK | COUNTS),
        ),
        # As Azure begins a stream.
        events_of()._replace(
            content=template.sse_event(CHUNK | {"choices": [], "model": ""}) + chat(END).content
        ),
        # What is more than text.
        chat(with_delta(tool_calls=[{"index": 0, "id": "call_a", "function": {"name": "f"}}]), END),
        chat(with_delta(tool_calls=[{"index": 0, "id": "call_b"}]), END),
        chat(with_delta(reasoning="since"), END),
        chat(with_delta(reasoning_details=[{"type": "reasoning.text"}]), END),
        chat(with_delta(content=[{"type": "text", "text": "hi"}]), END),
        chat(with_delta(annotations=[{}]), END),
        chat(with_delta(audio={"id": "a"}), END),
        chat(with_delta(function_call={"name": "f"}), END),
        chat(with_delta(refusal=None), END),
        chat(HI | {"token_ids": [1]}, END),
        chat(HI, END | {"content_filter_results": {}}),
        chat(HI | {"logprobs": {"content": [TOKEN]}}, END),
        chat(HI | {"logprobs": {"content": None}}, END | {"logprobs": {"content": None}}),
        chat(HI | {"logprobs": {"content": [], "refusal": []}}, END | {"logprobs": {}}),
        # Token counts that are missing, or beside a choice.
        chat(END)._replace(trailer=b""),
        chat(END, usage=USAGE),
        chat(END, counts={"choices": [], "usage": {"total_tokens": 3}}),
        chat(END, counts={"choices": [END], "usage": USAGE}),
        chat(END, counts=COUNTS | {"metrics": {"queue_time_ms": 1.0}}),
        chat(END, counts=COUNTS | {"model": "other"}),
        chat(END, counts=COUNTS | {"usage": USAGE | {"completion_tokens_details": {}}}),
        chat(END, counts=COUNTS | {"usage": USAGE | {"cost": 1}}),
        chat(END, obfuscation="xyz"),
        chat(END, head=CHUNK | {"object": ""}),
        # An event with more than data.
        chat(END)._replace(content=b"id: 7\n" + chat(END).content),
        Answer(Encoding.JSON, b'{"choices":[]}'),
        Answer(Encoding.JSON, b"[]"),
        body_of(choices=[]),
        body_of(choice={"index": 1}),
        body_of(choice={"finish_reason": None}),
        body_of(choice={"token_ids": [1]}),
        body_of(choice={"routed_experts": "x"}),
        body_of(choice={"logprobs": {"content": [TOKEN | {"logprob": -9999.0}]}}),
        body_of({"role": "assistant", "content": None}),
        body_of({"role": "assistant", "content": "", "tool_calls": [CALL]}),
        body_of({"role": "assistant", "content": "", "function_call": CALL["function"]}),
        body_of({"role": "assistant", "content": "hi", "reasoning": "since"}),
        body_of({"role": "assistant", "content": "hi", "reasoning_content": None}),
        body_of({"role": "assistant", "content": [{"type": "text", "text": "hi"}]}),
        body_of(usage=None),
        body_of(metrics={"queue_time_ms": 1.0}),
        body_of(kv_transfer_params={"x": 1}),
        body_of(prompt_logprobs=[None]),
        body_of(object=""),
        body_of(citations=[]),
    ],
)
def test_what_has_no_other_form_is_said(answer: Answer) -> None:
    other = Encoding.JSON if answer.encoding == Encoding.SSE else Encoding.SSE
    with pytest.raises(convert.NotConvertibleError):
        convert.convert(answer, other)


def test_the_fingerprint_is_where_vllm_puts_it() -> None:
    events = convert.convert(body_of(system_fingerprint="fp"), Encoding.SSE)
    for wants_usage in (False, True):
        content = template.strip_usage_marks(events.content, wants_usage=wants_usage)
        chunks = [orjson.loads(rendered(part)[6:]) for part in content.split(b"\n\n") if part]
        fingerprints = [chunk.get("system_fingerprint") for chunk in chunks]
        assert fingerprints == [None, None if wants_usage else "fp"]
    assert orjson.loads(rendered(events.trailer)[6:])["system_fingerprint"] == "fp"


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
