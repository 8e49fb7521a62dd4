"""The labels of an answer, by which it may be purged: its model, its tenant, its request's tags.

Tags come in the body's field `cache`, as `{"tags": ["…"]}`, which is ours and not the engine's.
"""

from hashlib import blake2b
from typing import Any

from tiers.purges import label

ANONYMOUS = "anonymous"
"""The tenant of requests without an `Authorization` header."""
MAX_TAGS = 16
MAX_TAG_CHARACTERS = 128


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
    return blake2b(scope).hexdigest()[:16] if scope else ANONYMOUS


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
            f"cache.tags should be a list of at most {MAX_TAGS} texts of 1 to {MAX_TAG_CHARACTERS} "
            "printable characters",
            "cache.tags",
        )
    return tags


def _is_tag(tag: Any) -> bool:
    return isinstance(tag, str) and 0 < len(tag) <= MAX_TAG_CHARACTERS and tag.isprintable()
