"""Answers out of what an engine sends, and either form out of the other.

The engine's JSON is kept as it came but for marks: bytes that JSON forbids unescaped (RFC 8259,
section 7) and that therefore can't be part of an answer. They stand for what is fresh each time an
answer is given (`server.shapes`), and around what belongs only into a stream without token counts.
"""

import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import orjson

from server.shapes import CHOICES, FLAT, Shape
from tiers import Answer, Form
from tiers.answer import CREATED, ID

_UNCOUNTED, _END = b"\x02", b"\x03"
_MARKS = CHOICES.fresh
# Of a body, what stands before the first value that has others in it.
_head = re.compile(rb'\s*\{(?:[^"{}\[\]]|"[^"\\]*")*').match
_fresh_fields = tuple(
    (re.compile(rb'("%s"\s*:\s*)("[^"\\]*"|\d+)' % name.encode()), mark)
    for name, mark in FLAT.fresh.items()
)
_without_uncounted = re.compile(_UNCOUNTED + b"[^" + _END + b"]*" + _END).sub


class NotConvertibleError(ValueError):
    """The answer isn't of the shape that the other form could be made of."""


def template(
    parsed: dict[str, Any], marks: Mapping[str, bytes] = _MARKS, within: str | None = None
) -> bytes:
    """Return JSON in which marks stand for the values of some fields.

    Args:
        parsed: the JSON.
        marks: by the names of the fields.
        within: the field whose value has these fields, if not the whole of it.
    """
    if within is None:
        fields = [_field(name, marks.get(name) or orjson.dumps(v)) for name, v in parsed.items()]
    else:
        fields = [
            _field(
                name, template(v, marks) if name == within and v is not None else orjson.dumps(v)
            )
            for name, v in parsed.items()
        ]
    return b"{" + b",".join(fields) + b"}"


def _field(name: str, value: bytes) -> bytes:
    return orjson.dumps(name) + b":" + value


def event(parsed: dict[str, Any], shape: Shape = CHOICES, kind: bytes = b"") -> bytes:
    """Return a server-sent event for one chunk, as a template; `kind` is its type, if any."""
    line = b"event: " + kind + b"\n" if kind else b""
    return line + b"data: " + template(parsed, shape.fresh, shape.within) + b"\n\n"


def flat(raw: bytes) -> bytes | None:
    """Return a body as a template that is read only where it begins.

    `None` if it isn't an object, or is an error.
    """
    found = _head(raw)
    if found is None or ID in raw or CREATED in raw:
        return None
    head = found[0]
    if b'"error"' in head:
        return None
    for field, mark in _fresh_fields:
        head = field.sub(rb"\g<1>" + mark, head, count=1)
    return head + raw[found.end() :]


def stamped(last: bytes, usage: dict[str, Any]) -> bytes:
    """Return the last event with what vLLM puts there where no token counts follow."""
    if not usage.get("system_fingerprint"):
        return last
    stamp = b',"system_fingerprint":' + orjson.dumps(usage["system_fingerprint"])
    return last.removesuffix(b"}\n\n") + _UNCOUNTED + stamp + _END + b"}\n\n"


def fill(content: bytes, id_: bytes, created: int) -> bytes:
    """Return a template with a fresh `id` and `created` (Unix s) in place of the marks."""
    return content.replace(ID, id_).replace(CREATED, b"%d" % created)


def counted(content: bytes, *, wants_usage: bool) -> bytes:
    """Return events as they are where token counts follow, or where none do."""
    if _UNCOUNTED not in content:
        return content
    if wants_usage:
        return _without_uncounted(b"", content)
    return content.replace(_UNCOUNTED, b"").replace(_END, b"")


def rendered(answer: Answer, id_: bytes, created: int, *, wants_usage: bool, done: bytes) -> bytes:
    """Return an answer in its own form, all of it, as a client gets it; `done` ends a stream."""
    content = answer.content
    if answer.form is Form.EVENTS:
        usage = answer.usage if wants_usage else b""
        content = counted(content, wants_usage=wants_usage) + usage + done
    return fill(content, id_, created)


def etag(answer: Answer, *, wants_usage: bool) -> str:
    """Return the tag of an answer in its own form: the same for all that differ in marks alone."""
    tag = blake2b(answer.content, digest_size=8)
    if wants_usage:
        tag.update(answer.usage)
    return f'W/"{tag.hexdigest()}"'


def as_form(answer: Answer, form: Form) -> Answer:
    """Return the answer in that form.

    Raises:
        NotConvertibleError: it can't be made of this answer.
    """
    if answer.form is form:
        return answer
    try:
        return _as_body(answer) if form is Form.BODY else _as_events(answer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        raise NotConvertibleError(f"can't be made {form.name}: {exc!r}") from exc


def _as_body(answer: Answer) -> Answer:
    chunks = [_parse(part) for part in answer.content.split(b"\n\n") if part]
    usage = _parse(answer.usage.strip()) if answer.usage else {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            _merge(choices.setdefault(part["index"], {"index": part["index"]}), part)
    body = chunks[0] | {"choices": [choices[index] for index in sorted(choices)]}
    body["object"] = body["object"].removesuffix(".chunk")
    body["system_fingerprint"] = usage.get("system_fingerprint")
    body |= {name: usage[name] for name in ("usage", "metrics") if usage.get(name)}
    return Answer(Form.BODY, template(body))


def _as_events(answer: Answer) -> Answer:
    body = _parse(b"data: " + answer.content)
    chat = "message" in body["choices"][0]
    head = {
        "id": "",
        "object": body["object"] + (".chunk" if chat else ""),
        "created": 0,
        "model": body.get("model"),
    }
    deltas = _chat_deltas if chat else _text_deltas
    *events, last = [
        event(head | {"choices": [delta]}) for choice in body["choices"] for delta in deltas(choice)
    ]
    usage = head | {"choices": [], "usage": body.get("usage")}
    usage |= {name: body[name] for name in ("system_fingerprint", "metrics") if body.get(name)}
    return Answer(Form.EVENTS, b"".join([*events, stamped(last, usage)]), event(usage))


def _parse(part: bytes) -> Any:
    plain = part.removeprefix(b"data: ").replace(_MARKS["id"], b'""').replace(CREATED, b"0")
    return orjson.loads(counted(plain, wants_usage=True))


def _text_deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield choice


def _chat_deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    message = dict(choice["message"])
    unsaid = {"index": choice["index"], "logprobs": None, "finish_reason": None}
    yield unsaid | {"delta": {"role": message.pop("role"), "content": ""}}
    content, calls = message.pop("content", None), message.pop("tool_calls", None)
    # Such as reasoning, which comes before what was reasoned about.
    if rest := {name: value for name, value in message.items() if value}:
        yield unsaid | {"delta": rest}
    if calls:
        numbered = [{"index": number} | call for number, call in enumerate(calls)]
        yield unsaid | {"delta": {"tool_calls": numbered}}
    last = {name: value for name, value in choice.items() if name != "message"}
    yield last | {"delta": {"content": content} if content else {}}


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
        elif key == "token_ids" and choice.get("token_ids"):
            # The last one may say none.
            choice["token_ids"] += value or []
        elif value is not None or key not in choice:
            choice[key] = value


def _merge_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls":
            for call in value or ():
                _merge_call(message.setdefault("tool_calls", []), call)
        elif key != "role" and isinstance(value, str):
            message[key] = (message.get(key) or "") + value
        elif value:
            message[key] = value


def _merge_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    index = part.get("index", 0)
    while len(calls) <= index:
        calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    for key, value in part.items():
        if key == "function":
            for name, text in (value or {}).items():
                if isinstance(text, str):
                    call["function"][name] = call["function"].get(name, "") + text
        elif key != "index" and value is not None:
            call[key] = value
