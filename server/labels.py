"""The labels of an answer, by which it may be purged: its model, its tenant, its request's tags.

Tags come in the body's field `cache`, as `{"tags": ["…"]}`, which is ours and not the engine's.
"""

import re
from hashlib import blake2b
from typing import Any

from tiers.key import is_key
from tiers.purges import KEY, label

ANONYMOUS = "anonymous"
"""The tenant of requests without an `Authorization` header."""
MAX_TAGS = 16
MAX_TAG_CHARACTERS = 128

_TAG = f"1 to {MAX_TAG_CHARACTERS} printable characters"
_TENANT_DIGITS = 16
_is_tenant = re.compile(f"[0-9a-f]{{{_TENANT_DIGITS}}}").fullmatch


class BadRequestError(ValueError):
    """The body can't be understood; the text says why, and `param` which field is meant."""

    def __init__(self, problem: str, param: str | None = None) -> None:
        super().__init__(problem)
        self.param = param


def labels_of(model: str, scope: bytes, cache: Any) -> tuple[str, ...]:
    """Return the labels of a request's answer.

    Args:
        model: the model's name.
        scope: the `Authorization` header.
        cache: the body's field `cache`, or `None`.

    Raises:
        BadRequestError: `cache` isn't as it should be.
    """
    tags = (label("tag", tag) for tag in _tags(cache))
    return tuple(dict.fromkeys((label("model", model), label("tenant", tenant_of(scope)), *tags)))


def tenant_of(scope: bytes) -> str:
    """Return the name of whoever sends this `Authorization` header, which doesn't reveal it."""
    return blake2b(scope).hexdigest()[:_TENANT_DIGITS] if scope else ANONYMOUS


def misnamed(kind: str, name: str) -> str | None:
    """Return what a name of that kind should be, if no entry can ever have the label."""
    if kind == KEY and not is_key(name):
        return "64 hexadecimal digits, as `tierserve cache ls` prints them"
    if kind == "tenant" and name != ANONYMOUS and not _is_tenant(name):
        return f"{ANONYMOUS}, or 16 hexadecimal digits, as `tierserve cache get` prints them"
    if kind == "tag" and not _is_tag(name):
        return _TAG
    return None


def _tags(cache: Any) -> list[str]:
    if cache is None:
        return []
    if not isinstance(cache, dict):
        raise BadRequestError('cache should be an object such as {"tags": ["a"]}', "cache")
    if unknown := cache.keys() - {"tags"}:
        name = f"cache.{min(unknown)}"[:MAX_TAG_CHARACTERS]
        raise BadRequestError(f"{name} isn't known; cache should have tags alone", name)
    tags = cache.get("tags")
    if tags is None:
        return []
    if not isinstance(tags, list) or len(tags) > MAX_TAGS or not all(map(_is_tag, tags)):
        raise BadRequestError(
            f"cache.tags should be a list of at most {MAX_TAGS} texts, each of {_TAG}", "cache.tags"
        )
    return tags


def _is_tag(tag: Any) -> bool:
    return isinstance(tag, str) and 0 < len(tag) <= MAX_TAG_CHARACTERS and tag.isprintable()
