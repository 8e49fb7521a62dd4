"""What sections of the configuration have in common."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

HTTP_URL = re.compile(r"https?://[^/\s]+(/[^\s?#]*)?").fullmatch
MASK = "***"
"""What is shown of a secret."""
_CENTURY_S = 100 * 366 * 24 * 3600
Seconds = Annotated[float, Field(ge=0, le=_CENTURY_S)]
PositiveSeconds = Annotated[float, Field(gt=0, le=_CENTURY_S)]


class Section(BaseModel):
    """A part of the configuration, in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)
