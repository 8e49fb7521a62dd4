"""The labels of an answer, by which it may be purged: its model, its tenant, its request's tags."""

import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from tiers.key import is_key
from tiers.purges import KEY, label

ANONYMOUS = "anonymous"
"""The tenant of requests without an `Authorization` header."""
MAX_TAGS = 16
MAX_TAG_CHARACTERS = 128

A_TAG = f"1 to {MAX_TAG_CHARACTERS} printable characters"
"""What a tag should be."""
_TENANT_DIGITS = 16
_is_tenant = re.compile(f"[0-9a-f]{{{_TENANT_DIGITS}}}").fullmatch


def labels_of(model: str, scope: bytes, tags: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of a request's answer; `scope` is the `Authorization` header."""
    tagged = (label("tag", tag) for tag in tags)
    return tuple(dict.fromkeys((label("model", model), label("tenant", tenant_of(scope)), *tagged)))


def tenant_of(scope: bytes) -> str:
    """Return the name of whoever sends this `Authorization` header, which doesn't reveal it."""
    return blake2b(scope).hexdigest()[:_TENANT_DIGITS] if scope else ANONYMOUS


def misnamed(kind: str, name: str) -> str | None:
    """Return what a name of that kind should be, if no entry can ever have the label."""
    if kind == KEY and not is_key(name):
        return "64 hexadecimal digits, as `tierserve cache ls` prints them"
    if kind == "tenant" and name != ANONYMOUS and not _is_tenant(name):
        return f"{ANONYMOUS}, or 16 hexadecimal digits, as `tierserve cache get` prints them"
    if kind == "tag" and not is_tag(name):
        return A_TAG
    return None


def is_tag(tag: Any) -> bool:
    """Whether a value may be a tag."""
    return isinstance(tag, str) and 0 < len(tag) <= MAX_TAG_CHARACTERS and tag.isprintable()
