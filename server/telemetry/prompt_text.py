"""The text of prompts, in the order in which engines read it: tools, system prompt, messages.

It is what a client sent, without a chat template, so it is near to what an engine reads, and equal
where that is equal. Fields that the engine drops aren't part of it (`server.protocol.vllm_fields`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic_core import from_json, to_json

from server.protocol.request import ParsedRequest

TOOLS = "tools: "
"""What the part with the tools begins with."""
# Clients write the tools and the cache key, and we write the salt, after the messages.
_LAST_FIELDS = ("tools", "cache_salt", "prompt_cache_key")
_PARTS = 10
_CUTS = (1024, 4096, 16384)


def prompt_fields(request: ParsedRequest, max_bytes: int) -> dict[str, Any]:
    """Return the fields of a body's first `max_bytes`, its tools and its salt.

    Raises:
        ValueError: it is nested too deeply.
    """
    fields = _parse_start(request.raw, max_bytes)
    return request.route.fields.normalize(fields) if request.is_vllm else fields


def prompt_parts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of a prompt as texts; of several prompts, only of the first."""
    for name in ("tools", "system", "instructions"):
        if value := fields.get(name):
            yield f"{name}: {_text(value)}\n"
    prompt = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if not isinstance(prompt, list):
        if isinstance(prompt, str):
            yield prompt
        return
    if prompt and isinstance(prompt[0], list | str):
        yield _text(prompt[0])
    elif prompt and isinstance(prompt[0], int):
        yield _text(prompt)
    else:
        yield from map(_message, prompt)


def prompt_pieces(parts: Sequence[str], *, is_whole: bool) -> Iterator[tuple[int, str, int]]:
    """Cut a prompt at the ends of its beginnings; the last part may be cut off.

    A beginning ends at the end of one of the first parts, or within them after 1,024, 4,096 and
    16,384 characters, since long texts may differ only later. Yields the number of each piece's
    part, the piece, and how many characters the prompt has up to its end.
    """
    at = 0
    for index, part in enumerate(parts[:_PARTS]):
        done = 0
        ends = [cut - at for cut in _CUTS if at < cut < at + len(part)]
        if is_whole or index < len(parts) - 1:
            ends.append(len(part))
        for end in ends:
            yield index, part[done:end], at + end
            done = end
        at += len(part)


def _parse_start(body: bytes, max_bytes: int) -> dict[str, Any]:
    fields: dict[str, Any] = from_json(
        body[:max_bytes], allow_partial="trailing-strings", cache_strings="none"
    )
    if len(body) <= max_bytes:
        return fields
    for name in _LAST_FIELDS:
        # A quote within a text has a backslash before it, so this is a field's name. If it is no
        # field of the body, the rest isn't valid JSON.
        at = body.rfind(b'"%s":' % name.encode(), len(body) - max_bytes)
        if at >= 0 and name not in fields:
            with suppress(ValueError):
                fields[name] = from_json(b"{" + body[at:])[name]
    return fields


def _message(item: Any) -> str:
    if not isinstance(item, dict):
        return _text(item)
    role = item.get("role")
    rest = {name: value for name, value in item.items() if name != "role"}
    content = rest["content"] if rest.keys() == {"content"} else rest
    return f"{role}: {_text(content)}\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value).decode()
