"""What sections of the configuration have in common."""

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

_has_shape = re.compile(r"https?://[^/\s]+(/[^\s?#]*)?").fullmatch
MASK = "***"
"""What is shown of a secret."""
CENTURY_S = 100 * 366 * 24 * 3600
"""More than any time that means something, and little enough to reckon with."""
Seconds = Annotated[float, Field(ge=0, le=CENTURY_S)]
PositiveSeconds = Annotated[float, Field(gt=0, le=CENTURY_S)]


def expanded(path: Path) -> Path:
    """Return a path with the home that `~` stands for.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ValueError("should have a user that there is after ~") from exc


FilePath = Annotated[Path, AfterValidator(expanded)]
"""A path that may begin with `~`."""


class Section(BaseModel):
    """A part of the configuration, in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
