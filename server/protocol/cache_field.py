"""What a request says in its body's field `cache`, which is for us and not for the engine.

It is for clients that can set fields only, such as OpenAI's with `extra_body`:

    {"cache": {"mode": "no-cache", "ttl": 3600, "tags": ["faq"], "variants": 3}}

`mode` says what `Cache-Control` says in a header, and `use`, that the answer is to be kept
although the request asks for chance.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from server.config.base import CENTURY_S
from server.config.schema import MAX_VARIANTS
from server.protocol.cache_control import NO_CACHE, CacheControl
from server.protocol.errors import BadRequestError
from server.protocol.labels import A_TAG, MAX_TAG_CHARACTERS, MAX_TAGS, is_tag
from tiers.acceptance import Acceptance

_USE = "use"
_MODES = {
    "default": CacheControl(),
    _USE: CacheControl(),
    "no-cache": NO_CACHE,
    "no-store": CacheControl(no_store=True),
    "only-if-cached": CacheControl(Acceptance(only_if_cached=True)),
}


class CacheField(NamedTuple):
    """The field, read."""

    control: CacheControl = CacheControl()
    use: bool = False
    """Whether the answer may be kept although the request asks for chance."""
    ttl_s: float | None = None
    """How long the answer is good for that this request has made, if not as configured."""
    tags: tuple[str, ...] = ()
    variants: int | None = None
    """Between how many answers to choose in turn, where the request asks for chance."""


def parse_cache_field(field: Any) -> CacheField:
    """Read the field; `None` stands for one that isn't there, as does `null` for any part of it.

    Raises:
        BadRequestError: it isn't as it should be; the error names the part.
    """
    if field is None:
        return CacheField()
    if not isinstance(field, dict):
        raise BadRequestError('cache should be an object such as {"tags": ["a"]}', "cache")
    if unknown := field.keys() - _PARTS.keys():
        name = f"cache.{min(unknown)}"[:MAX_TAG_CHARACTERS]
        raise BadRequestError(f"{name} isn't known; cache takes {', '.join(_PARTS)}", name)
    given = {name: value for name, value in field.items() if value is not None}
    for name, value in given.items():
        is_right, should = _PARTS[name]
        if not is_right(value):
            raise BadRequestError(f"cache.{name} should be {should}", f"cache.{name}")
    mode = given.get("mode", "default")
    return CacheField(
        control=_MODES[mode],
        use=mode == _USE,
        ttl_s=given.get("ttl"),
        tags=tuple(given.get("tags", ())),
        variants=given.get("variants"),
    )


def _is_ttl(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= CENTURY_S


def _are_tags(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_TAGS and all(map(is_tag, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_VARIANTS


_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mode": (
        lambda value: isinstance(value, str) and value in _MODES,
        f"one of {', '.join(_MODES)}",
    ),
    "tags": (
        _are_tags,
        f"a list of at most {MAX_TAGS} texts, each of {A_TAG}",
    ),
    "ttl": (_is_ttl, "a number of seconds, more than 0"),
    "variants": (_is_count, f"an integer from 1 to {MAX_VARIANTS}"),
}

SCHEMA: Mapping[str, Any] = {
    "type": ["object", "null"],
    "description": "How the answer is kept; the engine doesn't see it",
    "additionalProperties": False,
    "properties": {
        "mode": {"description": "As Cache-Control, or `use`", "enum": [*_MODES, None]},
        "ttl": {
            "type": ["number", "null"],
            "description": "Seconds for which an answer made now is good",
            "exclusiveMinimum": 0,
            "maximum": CENTURY_S,
        },
        "tags": {
            "type": ["array", "null"],
            "description": "By what the answer may be purged",
            "maxItems": MAX_TAGS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_TAG_CHARACTERS},
        },
        "variants": {
            "type": ["integer", "null"],
            "description": "How many answers are kept where chance is asked for",
            "minimum": 1,
            "maximum": MAX_VARIANTS,
        },
    },
}
"""The field as JSON Schema says it; a tag has to be printable, too."""
