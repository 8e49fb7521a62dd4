"""What a request was served: the record that its handler returns with the response."""

from typing import NamedTuple

from tiers import Answer


class Served(NamedTuple):
    """What a request was served, as its handler knows it."""

    tier: str
    """The tier that answered, `engine`, or `none`."""
    outcome: str
    model: str = ""
    """By its engine's name; empty for requests to us."""
    key: str = ""
    """Of the answer, if it may be kept."""
    answer: Answer | None = None
    """The answer, if it may be kept."""
    saved_s: float = 0
    """The seconds for which the answer was once generated that a tier had."""


OWN = Served("none", "own")
"""What we answer by ourselves."""
REFUSED = Served("none", "refused")
"""What an access check refuses."""


def attach(exc: BaseException, served: Served) -> None:
    """Note on an exception that ends a request what was being served; the first note counts."""
    vars(exc).setdefault("served", served)


def attached(exc: BaseException) -> Served:
    """Return what `attach` has noted."""
    served = vars(exc).get("served", OWN)
    return served if isinstance(served, Served) else OWN
