"""What all sections of the configuration share: their base class, field types, and errors."""

import re
from collections.abc import Sequence
from importlib.metadata import version
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
)
from pydantic_core import PydanticCustomError

from server.config.environment import choices
from server.config.yaml_loader import EMPTY

_has_shape = re.compile(r"https?://[^/\s]+(/[^\s?#]*)?").fullmatch
SERVER = "tierserve"
"""Our name in the header `Server`, by which we know another of us."""
VERSION = version("tierserve")
"""The version, which `pyproject.toml` sets."""
MASK = "***"
"""Stands for a secret in what we print."""
CENTURY_S = 100 * 366 * 24 * 3600
"""The longest duration: longer ones mean nothing, and could overflow."""
Seconds = Annotated[float, Field(ge=0, le=CENTURY_S)]
PositiveSeconds = Annotated[float, Field(gt=0, le=CENTURY_S)]
RELOAD_MARK = "x-reload"
RELOADED = Field(json_schema_extra={RELOAD_MARK: True})
"""Marks a field whose value can change while the server runs (`server.config.changes`)."""


def expand_home(path: Path) -> Path:
    """Return a path with the home folder in place of `~`.

    Raises:
        ValueError: there is no such user, or the user has no home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ValueError("should be without ~, or name a user who has a home") from exc


FilePath = Annotated[Path, AfterValidator(expand_home)]
"""A path that may begin with `~`."""


def _check_json_lines(path: Path) -> Path:
    if path.suffix != ".jsonl":
        raise ValueError("should end in .jsonl")
    return path


JsonLinesPath = Annotated[FilePath, AfterValidator(_check_json_lines)]
"""A path of JSON lines."""


class Section(BaseModel):
    """A section of the configuration. An unknown key is a mistake.

    A section, list or mapping without a value is empty. Any other field without a value is a
    mistake, since it could mean to turn the field off. A boolean isn't a number.

    The text below a field describes it in the reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, data: Any) -> Any:
        return {} if data is EMPTY else data

    @field_validator("*", mode="before")
    @classmethod
    def _require_value(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = choices(cls.model_fields[info.field_name or ""].annotation)
        if value is EMPTY:
            return _empty_value(kinds)
        if isinstance(value, bool) and bool not in kinds and any(map(_is_number, kinds)):
            raise ValueError("should be a number")
        return value


def _empty_value(kinds: Sequence[Any]) -> Any:
    """Return the value of a field after whose key nothing stands."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Section):
            return {}
        if (origin := get_origin(kind)) in (dict, tuple):
            return origin()
    null = ", or null for none" if NoneType in kinds else ""
    raise ValueError(f"has no value; leave the key out for its default, or give it one{null}")


def _is_number(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, int | float)


# In place of pydantic's messages, which speak of Python's types.
_SIZE = "should be a size such as 256MiB"
_EXPECTED = {
    "byte_size": _SIZE,
    "byte_size_unit": _SIZE,
    "dict_type": "should hold names with values",
    "missing": "should be set",
    "string_type": "should be text, in quotes if YAML takes it for something else",
    "too_short": "should have at least one entry",
    "tuple_type": "should be a list",
}


def expected(error: Any) -> str:
    """Return what would be right in place of one of pydantic's errors."""
    message: str = error["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    return _EXPECTED.get(error["type"], message.replace("Input should", "should", 1))


CONFLICT = "conflict"
"""The error type of mistakes that no other mistake explains."""


def conflict(text: str) -> PydanticCustomError:
    """Return the error of fields that are valid each, but not together."""
    return PydanticCustomError(CONFLICT, "{text}", {"text": text})


def is_http_url(text: str) -> bool:
    """Return whether a text is the address of an HTTP server, with or without a path."""
    try:
        parts = urlsplit(text)
        return _has_shape(text) is not None and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class ConfigError(ValueError):
    """The configuration can't be used; `mistakes` has a line for each mistake."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes
