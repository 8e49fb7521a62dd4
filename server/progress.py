"""A progress bar on standard error, where that is a terminal and tqdm is installed."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TypeVar

_Request = TypeVar("_Request")


def shown(
    requests: Iterable[_Request], name: str, *, total: int | None = None
) -> Iterable[_Request]:
    """Pass requests on and show how far it is, unless all is over in a moment.

    `total` is how many there are, where they don't know it.
    """
    if find_spec("tqdm") is None:
        return requests
    from tqdm import tqdm

    bar: Iterable[_Request] = tqdm(
        requests, desc=name, total=total, unit=" requests", delay=1, disable=None, leave=False
    )
    return bar
