"""Anthropic's Messages as vLLM reads them: without what it ignores within their fields.

The classes of its requests (0.32; `vllm/entrypoints/anthropic/protocol.py`) take fields that they
don't know and drop them, such as `cache_control`. They know `signature` and `is_error`, but nothing
reads these. Of a system prompt in blocks, vLLM drops a block that begins as Claude Code's billing
header does. Clients change all of these from call to call. What a class may refuse stays, and so
does what a tool takes or is called with: its names are the client's own.
"""

from collections.abc import Mapping
from typing import Any

_MARKER = "cache_control"
_IGNORED: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    (_MARKER, object),
    ("is_error", (bool, type(None))),
    ("signature", (str, type(None))),
)
_IGNORED_NAMES = frozenset(name for name, _ in _IGNORED)
_BILLING_HEADER = "x-anthropic-billing-header"
_PLAIN = frozenset({"type", "text", _MARKER})


def without_ignored_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body without what vLLM ignores within them; `body` isn't changed."""
    fields = dict(body)
    if isinstance(system := fields.get("system"), list):
        fields["system"] = _blocks(system, "system")
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [
            message | {"content": _blocks(content, message.get("role"))}
            if isinstance(message, dict) and isinstance(content := message.get("content"), list)
            else message
            for message in messages
        ]
    if isinstance(tools := fields.get("tools"), list):
        fields["tools"] = _unmarked(tools)
    return fields


def _blocks(blocks: list[Any], role: Any) -> list[Any]:
    # A conversation has hundreds of them, so this loop is written to be quick.
    made = []
    for block in blocks:
        left = block
        if isinstance(block, dict):
            if role == "system" and _is_billing_header(block):
                continue
            if not _IGNORED_NAMES.isdisjoint(block):
                left = _without_ignored(block)
            # Of a tool's result in any other message vLLM takes every word.
            if role == "user" and isinstance(parts := block.get("content"), list):
                left = left | {"content": _unmarked(parts)}
        made.append(left)
    return made


def _without_ignored(block: dict[str, Any]) -> dict[str, Any]:
    left = block.copy()
    for name, types in _IGNORED:
        if name in left and isinstance(left[name], types):
            del left[name]
    return left


def _unmarked(parts: list[Any]) -> list[Any]:
    return [
        {name: value for name, value in part.items() if name != _MARKER}
        if isinstance(part, dict) and _MARKER in part
        else part
        for part in parts
    ]


def _is_billing_header(block: dict[str, Any]) -> bool:
    text = block.get("text")
    return (
        isinstance(text, str)
        and text.startswith(_BILLING_HEADER)
        and block.get("type") == "text"
        and block.keys() <= _PLAIN
    )
