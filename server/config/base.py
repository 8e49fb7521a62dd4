"""What sections of the configuration have in common."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip
from pydantic_core import PydanticCustomError

from server.config.environment import choices
from server.config.yaml_loader import EMPTY

_has_shape = re.compile(r"https?://[^/\s]+(/[^\s?#]*)?").fullmatch
MASK = "***"
"""What is shown of a secret."""
CENTURY_S = 100 * 366 * 24 * 3600
"""More than any time that means something, and little enough to reckon with."""
Seconds = Annotated[float, Field(ge=0, le=CENTURY_S)]
PositiveSeconds = Annotated[float, Field(gt=0, le=CENTURY_S)]


def expand_home(path: Path) -> Path:
    """Return a path with the home that `~` stands for.

    Raises:
        ValueError: there is no such user, or this one has no home.
    """
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ValueError("should be without ~, or name a user who has a home") from exc


FilePath = Annotated[Path, AfterValidator(expand_home)]
"""A path that may begin with `~`."""


class Section(BaseModel):
    """A part of the configuration, in which an unknown key is a mistake.

    A section, list or mapping without a value is empty, which is a mistake where it needs an entry.
    Any other field without a value is a mistake, since that could mean to turn it off. A boolean is
    no number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _has_keys(cls, given: Any) -> Any:
        return {} if given is EMPTY else given

    @field_validator("*", mode="before")
    @classmethod
    def _is_given(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = choices(cls.model_fields[info.field_name or ""].annotation)
        if value is EMPTY:
            return _nothing_in(kinds)
        if isinstance(value, bool) and bool not in kinds and any(map(_is_number, kinds)):
            raise ValueError("should be a number")
        return value


def _nothing_in(kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Section):
            return {}
        if (origin := get_origin(kind)) in (dict, tuple):
            return origin()
    null = ", or null for none" if NoneType in kinds else ""
    raise ValueError(f"has no value; leave the key out for its default, or give it one{null}")


def _is_number(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, int | float)


# In place of pydantic's words, which are Python's.
_SHOULD = {
    "dict_type": "should hold names with values",
    "string_type": "should be text, in quotes if YAML takes it for something else",
    "too_short": "should have at least one entry",
    "tuple_type": "should be a list",
}


def expected(error: Any) -> str:
    """Return what would be right, of one of the errors that pydantic tells."""
    told: str = error["msg"].removeprefix("Value error, ")
    return _SHOULD.get(error["type"], told)


CONFLICT = "conflict"
"""The type of mistakes that are there whatever else is wrong."""


def conflict(text: str) -> PydanticCustomError:
    """Return the mistake of fields that each are right and can't stand together."""
    return PydanticCustomError(CONFLICT, "{text}", {"text": text})


def is_http_url(text: str) -> bool:
    """Whether it is an address of an HTTP server, with or without a path."""
    try:
        parts = urlsplit(text)
        return _has_shape(text) is not None and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class ConfigError(ValueError):
    """The configuration can't be used. `mistakes` has one line for each thing that is wrong."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


SERVER = "tierserve"
"""Our name in the header `Server`, by which we also know another of us."""
