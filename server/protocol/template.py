"""Templates: answers with marks in place of what differs in each response.

A mark is a byte that JSON forbids unescaped (RFC 8259, section 7), so no answer contains one.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import orjson

from server.protocol.formats import CHOICES, CREATED, ID, OPAQUE, AnswerFormat, Encoding
from tiers import Answer

# These enclose what belongs only into a stream without token counts.
_UNCOUNTED, _END = b"\x02", b"\x03"
MARKS = CHOICES.marks
_has_mark = re.compile(b"[%s]" % (ID + CREATED + _UNCOUNTED + _END)).search
# The part of a body before its first object or array.
_head = re.compile(rb'\s*\{(?:[^"{}\[\]]|"[^"\\]*")*').match
_marked_fields = tuple(
    (re.compile(rb'("%s"\s*:\s*)("[^"\\]*"|\d+)' % name.encode()), mark)
    for name, mark in OPAQUE.marks.items()
)
_drop_uncounted = re.compile(_UNCOUNTED + b"[^" + _END + b"]*" + _END).sub
DATA = b"data: "


class Verbatim(bytes):
    """Bytes of the engine that clients get unchanged: no template."""

    __slots__ = ()


def json_template(
    parsed: dict[str, Any], marks: Mapping[str, bytes] = MARKS, within: str | None = None
) -> bytes:
    """Return an object as JSON in which marks stand for the values of some fields.

    Args:
        parsed: the object.
        marks: the marks by the names of their fields.
        within: the field whose value has these fields; `None` for the object itself.
    """
    if within is None:
        fields = [_field(name, marks.get(name) or orjson.dumps(v)) for name, v in parsed.items()]
    else:
        fields = [
            _field(
                name,
                json_template(v, marks) if name == within and v is not None else orjson.dumps(v),
            )
            for name, v in parsed.items()
        ]
    return b"{" + b",".join(fields) + b"}"


def _field(name: str, value: bytes) -> bytes:
    return orjson.dumps(name) + b":" + value


def sse_event(
    parsed: dict[str, Any], answer_format: AnswerFormat = CHOICES, lines: bytes = b""
) -> bytes:
    """Return a chunk as a server-sent event, as a template.

    Args:
        parsed: the chunk.
        answer_format: of the answer that it is part of.
        lines: the event's lines before its data.

    Raises:
        ValueError: one of the `lines` contains a mark.
    """
    if lines and _has_mark(lines):
        raise ValueError("a line of an event contains a mark")
    return (
        lines + DATA + json_template(parsed, answer_format.marks, answer_format.envelope) + b"\n\n"
    )


def template_of_raw(raw: bytes) -> bytes | None:
    """Return a body as a template, or `None` if it isn't an object or is an error.

    Only its beginning is read, up to the first object or array.
    """
    begin = _head(raw)
    if begin is None or ID in raw or CREATED in raw:
        return None
    head = begin[0]
    if b'"error"' in head:
        return None
    for field, mark in _marked_fields:
        head = field.sub(rb"\g<1>" + mark, head, count=1)
    return head + raw[begin.end() :]


def with_fingerprint(last: bytes, usage: dict[str, Any]) -> bytes:
    """Return the last event with the fingerprint that vLLM puts there in streams without counts.

    Args:
        last: the event before the token counts.
        usage: the chunk of the token counts, which has the fingerprint in other streams.
    """
    if not usage.get("system_fingerprint"):
        return last
    field = b',"system_fingerprint":' + orjson.dumps(usage["system_fingerprint"])
    return last.removesuffix(b"}\n\n") + _UNCOUNTED + field + _END + b"}\n\n"


def fill_marks(content: bytes, id_: bytes, created: int) -> bytes:
    """Return a template with an `id` and `created` (Unix s) in place of the marks."""
    return content.replace(ID, id_).replace(CREATED, b"%d" % created)


def strip_usage_marks(content: bytes, *, wants_usage: bool) -> bytes:
    """Return events as they are in a stream with token counts, or in one without."""
    if _UNCOUNTED not in content:
        return content
    if wants_usage:
        return _drop_uncounted(b"", content)
    return content.replace(_UNCOUNTED, b"").replace(_END, b"")


def render_item(item: bytes, id_: bytes, created: int, *, wants_usage: bool) -> bytes:
    """Return one item of a flight as a client gets it."""
    if isinstance(item, Verbatim):
        return item
    return fill_marks(strip_usage_marks(item, wants_usage=wants_usage), id_, created)


def whole(answer: Answer, *, wants_usage: bool, done: bytes) -> bytes:
    """Return a whole answer as a template, in its own encoding; `done` ends a stream."""
    content = answer.content
    if answer.encoding != Encoding.SSE:
        return content
    usage = answer.trailer if wants_usage else b""
    return strip_usage_marks(content, wants_usage=wants_usage) + usage + done


def render(answer: Answer, id_: bytes, created: int, *, wants_usage: bool, done: bytes) -> bytes:
    """Return a whole answer as a client gets it, in its own encoding; `done` ends a stream."""
    content = whole(answer, wants_usage=wants_usage, done=done)
    # As `fill_marks` does; every hit would pay for the call.
    return content.replace(ID, id_).replace(CREATED, b"%d" % created)


def etag(answer: Answer, *, wants_usage: bool) -> str:
    """Return the tag of an answer in its own encoding, whatever replaces its marks."""
    tag = blake2b(answer.content, digest_size=8)
    if wants_usage:
        tag.update(answer.trailer)
    return f'W/"{tag.hexdigest()}"'
