"""Templates: answers with marks in place of what is fresh each time they are given."""

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import orjson

from server.protocol.formats import CHOICES, CREATED, ID, OPAQUE, AnswerFormat, Encoding
from tiers import Answer

_UNCOUNTED, _END = b"\x02", b"\x03"
_MARKS = CHOICES.marks
_has_mark = re.compile(b"[%s]" % (ID + CREATED + _UNCOUNTED + _END)).search
# Of a body, what stands before the first value that has others in it.
_head = re.compile(rb'\s*\{(?:[^"{}\[\]]|"[^"\\]*")*').match
_fresh_fields = tuple(
    (re.compile(rb'("%s"\s*:\s*)("[^"\\]*"|\d+)' % name.encode()), mark)
    for name, mark in OPAQUE.marks.items()
)
_without_uncounted = re.compile(_UNCOUNTED + b"[^" + _END + b"]*" + _END).sub
_DATA = b"data: "


class Verbatim(bytes):
    """What the engine has sent and clients get unchanged; it is no template."""

    __slots__ = ()


def json_template(
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
                name,
                json_template(v, marks) if name == within and v is not None else orjson.dumps(v),
            )
            for name, v in parsed.items()
        ]
    return b"{" + b",".join(fields) + b"}"


def _field(name: str, value: bytes) -> bytes:
    return orjson.dumps(name) + b":" + value


def sse_event(parsed: dict[str, Any], shape: AnswerFormat = CHOICES, lines: bytes = b"") -> bytes:
    """Return a server-sent event for one chunk, as a template.

    Raises:
        ValueError: a mark is in the `lines` that stand before its data.
    """
    if lines and _has_mark(lines):
        raise ValueError("an event has a mark in it")
    return lines + _DATA + json_template(parsed, shape.marks, shape.envelope) + b"\n\n"


def template_of_raw(raw: bytes) -> bytes | None:
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


def with_fingerprint(last: bytes, usage: dict[str, Any]) -> bytes:
    """Return the last event with what vLLM puts there where no token counts follow."""
    if not usage.get("system_fingerprint"):
        return last
    stamp = b',"system_fingerprint":' + orjson.dumps(usage["system_fingerprint"])
    return last.removesuffix(b"}\n\n") + _UNCOUNTED + stamp + _END + b"}\n\n"


def fill_marks(content: bytes, id_: bytes, created: int) -> bytes:
    """Return a template with a fresh `id` and `created` (Unix s) in place of the marks."""
    return content.replace(ID, id_).replace(CREATED, b"%d" % created)


def strip_usage_marks(content: bytes, *, wants_usage: bool) -> bytes:
    """Return events as they are where token counts follow, or where none do."""
    if _UNCOUNTED not in content:
        return content
    if wants_usage:
        return _without_uncounted(b"", content)
    return content.replace(_UNCOUNTED, b"").replace(_END, b"")


def render_item(item: bytes, id_: bytes, created: int, *, wants_usage: bool) -> bytes:
    """Return what a flight brings as a client gets it."""
    if isinstance(item, Verbatim):
        return item
    return fill_marks(strip_usage_marks(item, wants_usage=wants_usage), id_, created)


def render(answer: Answer, id_: bytes, created: int, *, wants_usage: bool, done: bytes) -> bytes:
    """Return an answer in its own form, all of it, as a client gets it; `done` ends a stream."""
    content = answer.content
    if answer.encoding == Encoding.SSE:
        usage = answer.trailer if wants_usage else b""
        content = strip_usage_marks(content, wants_usage=wants_usage) + usage + done
    return fill_marks(content, id_, created)


def etag(answer: Answer, *, wants_usage: bool) -> str:
    """Return the tag of an answer in its own form: the same for all that differ in marks alone."""
    tag = blake2b(answer.content, digest_size=8)
    if wants_usage:
        tag.update(answer.trailer)
    return f'W/"{tag.hexdigest()}"'
