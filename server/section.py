"""What sections of the configuration have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_CENTURY_S = 100 * 366 * 24 * 3600
Seconds = Annotated[float, Field(ge=0, le=_CENTURY_S)]
PositiveSeconds = Annotated[float, Field(gt=0, le=_CENTURY_S)]


class Section(BaseModel):
    """A part of the configuration, in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)
