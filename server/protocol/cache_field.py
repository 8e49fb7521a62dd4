"""The field `cache` of a request's body, which is for us and which no engine sees.

It is for clients that can't set headers, such as OpenAI's with `extra_body`:

    {"cache": {"mode": "no-cache", "ttl": 3600, "tags": ["faq"], "variants": 3}}
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.config.base import CENTURY_S
from server.config.schema import MAX_VARIANTS
from server.protocol.cache_control import CacheControl, parse_cache_control
from server.protocol.errors import BadRequestError
from server.protocol.labels import A_TAG, MAX_TAG_CHARACTERS, MAX_TAGS, require_tag

_Mode = Literal["default", "use", "no-cache", "no-store", "only-if-cached"]
_MODES = f"one of {', '.join(get_args(_Mode))}"
_TAGS = f"a list of at most {MAX_TAGS} texts, each of {A_TAG}"
_TTL = "a number of seconds, more than 0"
_VARIANTS = f"an integer from 1 to {MAX_VARIANTS}"
_Tag = Annotated[
    str, Field(min_length=1, max_length=MAX_TAG_CHARACTERS), AfterValidator(require_tag)
]
_Tags = Annotated[tuple[_Tag, ...], Field(max_length=MAX_TAGS, strict=False)]
_Seconds = Annotated[float, Field(gt=0, le=CENTURY_S)]
_Count = Annotated[int, Field(ge=1, le=MAX_VARIANTS)]


class CacheField(BaseModel):
    """How the answer is kept; the engine doesn't see it."""

    # The title of a part completes the error message «cache.PART should be …».
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, title="cache", use_attribute_docstrings=True
    )

    mode: Annotated[_Mode | None, Field(title=_MODES)] = None
    """As Cache-Control, or `use`: keep the answer although the request isn't deterministic"""
    tags: Annotated[_Tags | None, Field(title=_TAGS)] = None
    """By what the answer may be purged"""
    ttl_s: Annotated[_Seconds | None, Field(alias="ttl", title=_TTL)] = None
    """Seconds for which an answer made now is good"""
    variants: Annotated[_Count | None, Field(title=_VARIANTS)] = None
    """How many answers are given in turn where the request isn't deterministic"""
    fallback: Annotated[bool | None, Field(title="true or false")] = None
    """Whether the model's fallback may answer, by default true"""

    @cached_property
    def control(self) -> CacheControl:
        """The mode as `Cache-Control`, which knows no `use` and no `default`."""
        return parse_cache_control(self.mode or "")

    @property
    def use(self) -> bool:
        """Whether the answer may be kept although the request isn't deterministic."""
        return self.mode == "use"


SCHEMA: Mapping[str, Any] = CacheField.model_json_schema() | {"type": ["object", "null"]}
"""The field's JSON Schema. It can't express that tags are printable."""
_PARTS = SCHEMA["properties"]
_ABSENT = CacheField()


def parse_cache_field(field: Any) -> CacheField:
    """Read the field. `None` is the same as absence, for the field and for each of its parts.

    Raises:
        BadRequestError: it isn't as it should be; the error names the part.
    """
    if field is None:
        return _ABSENT
    if not isinstance(field, dict):
        raise BadRequestError('cache should be an object such as {"tags": ["a"]}', "cache")
    try:
        return CacheField.model_validate(field)
    except ValidationError as exc:
        wrong = [str(mistake["loc"][0]) for mistake in exc.errors(include_url=False)]
    # Names that aren't known come first, since they may be misspelt.
    if unknown := set(wrong) - set(_PARTS):
        name = f"cache.{min(unknown)}"[:MAX_TAG_CHARACTERS]
        raise BadRequestError(f"{name} isn't known; cache takes {', '.join(_PARTS)}", name)
    part = wrong[0]
    raise BadRequestError(f"cache.{part} should be {_PARTS[part]['title']}", f"cache.{part}")
