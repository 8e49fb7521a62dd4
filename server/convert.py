"""Answers out of what an engine sends, and either form out of the other.

The engine's JSON is kept as it came but for `id` and `created` at the top level.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from tiers import Answer, Form
from tiers.answer import CREATED, ID

_MARKS = {"id": b'"' + ID + b'"', "created": CREATED}
_UNFINISHED = (None, "abort", "error")


def template(parsed: dict[str, Any]) -> bytes:
    """Return JSON in which marks stand for the values of `id` and `created`."""
    fields = (
        orjson.dumps(k) + b":" + (_MARKS.get(k) or orjson.dumps(v)) for k, v in parsed.items()
    )
    return b"{" + b",".join(fields) + b"}"


def fill(content: bytes, id_: bytes, created: int) -> bytes:
    """Return a template with a fresh `id` and `created` (Unix s) in place of the marks."""
    return content.replace(ID, id_).replace(CREATED, b"%d" % created)


def event(parsed: dict[str, Any]) -> bytes:
    """Return a server-sent event for one chunk, as a template."""
    return b"data: " + template(parsed) + b"\n\n"


def is_finished(choices: Any) -> bool:
    """Whether every choice of a body ended by itself."""
    return bool(choices) and all(c.get("finish_reason") not in _UNFINISHED for c in choices)


def as_body(answer: Answer) -> bytes:
    """Return the answer as the template of a JSON body."""
    if answer.form is Form.BODY:
        return answer.content
    chunks = [_parse(part) for part in answer.content.split(b"\n\n") if part]
    usage = _parse(answer.usage.strip()) if answer.usage else {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            _merge(choices.setdefault(part["index"], {"index": part["index"]}), part)
    for choice in choices.values():
        message = choice.get("message", {})
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
    first = chunks[0] | {"choices": [choices[index] for index in sorted(choices)]}
    first["object"] = first["object"].removesuffix(".chunk")
    first["system_fingerprint"] = usage.get("system_fingerprint")
    if "usage" in usage:
        first["usage"] = usage["usage"]
    return template(first)


def as_events(answer: Answer) -> Answer:
    """Return the answer in the form of events."""
    if answer.form is Form.EVENTS:
        return answer
    body = _parse(b"data: " + answer.content)
    chat = "message" in body["choices"][0]
    head = {
        "id": "",
        "object": body["object"] + (".chunk" if chat else ""),
        "created": 0,
        "model": body.get("model"),
    }
    deltas = _chat_deltas if chat else _text_deltas
    events = [
        event(head | {"choices": [delta]}) for choice in body["choices"] for delta in deltas(choice)
    ]
    usage = head | {"choices": [], "usage": body.get("usage")}
    if body.get("system_fingerprint"):
        usage["system_fingerprint"] = body["system_fingerprint"]
    return Answer(Form.EVENTS, b"".join(events), event(usage))


def _parse(part: bytes) -> Any:
    plain = part.removeprefix(b"data: ").replace(_MARKS["id"], b'""').replace(CREATED, b"0")
    return orjson.loads(plain)


def _text_deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield choice


def _chat_deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    index, message = choice["index"], choice["message"]
    unsaid = {"index": index, "logprobs": None, "finish_reason": None}
    yield unsaid | {"delta": {"role": message["role"], "content": ""}}
    if message.get("reasoning"):
        yield unsaid | {"delta": {"reasoning": message["reasoning"]}}
    calls = message.get("tool_calls") or []
    if calls:
        numbered = [{"index": number} | call for number, call in enumerate(calls)]
        yield unsaid | {"delta": {"tool_calls": numbered}}
    last = {key: value for key, value in choice.items() if key != "message"}
    content = {"content": message["content"]} if message.get("content") else {}
    yield last | {"delta": content}


def _merge(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add what a chunk says of a choice."""
    for key, value in part.items():
        if key == "delta":
            _merge_message(
                choice.setdefault("message", {"role": "assistant", "content": None}), value
            )
        elif key == "text":
            choice["text"] = choice.get("text", "") + value
        elif key == "logprobs" and value and choice.get("logprobs"):
            for name, values in value.items():
                choice["logprobs"][name] = (choice["logprobs"].get(name) or []) + (values or [])
        elif key == "token_ids" and value and choice.get("token_ids"):
            choice["token_ids"] += value
        elif value is not None or key not in choice:
            choice[key] = value


def _merge_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls":
            for call in value:
                _merge_call(message.setdefault("tool_calls", []), call)
        elif key in ("content", "reasoning", "refusal") and value is not None:
            message[key] = (message.get(key) or "") + value
        elif value:
            message[key] = value


def _merge_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    while len(calls) <= part["index"]:
        calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[part["index"]]
    call["id"] = part.get("id") or call["id"]
    for key, value in (part.get("function") or {}).items():
        call["function"][key] += value or ""
