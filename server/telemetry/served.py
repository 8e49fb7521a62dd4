"""The record of how a request was served, which its handler returns with the response."""

from typing import NamedTuple

from tiers import Answer


class Served(NamedTuple):
    """How a request was served."""

    tier: str
    """The tier that answered, `engine`, or `none`."""
    outcome: str
    model: str = ""
    """The engine's name of it; empty for routes of our own."""
    key: str = ""
    """The answer's key, if it may be kept."""
    answer: Answer | None = None
    """The answer, if it may be kept."""
    saved_s: float = 0
    """How long it took to generate the answer that a tier served."""
    tokens: int | None = None
    """The answer's output tokens; `None` where they haven't been read yet."""
    asked: str = ""
    """The model that was asked for, if another one has answered in its place."""


OWN = Served("none", "own")
"""A response of our own, without tiers and engines."""
REFUSED = Served("none", "refused")
"""A request that an access check refused."""


def attach(exc: BaseException, served: Served) -> None:
    """Attach the record of a request to the exception that ends it; the first one counts."""
    vars(exc).setdefault("served", served)


def attached(exc: BaseException) -> Served:
    """Return the record that `attach` has attached."""
    served = vars(exc).get("served", OWN)
    return served if isinstance(served, Served) else OWN
