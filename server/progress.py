"""A progress bar on standard error, where that is a terminal and tqdm is installed."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from server.traces import Request


def shown(requests: Sequence[Request], name: str) -> Iterable[Request]:
    """Pass requests on and show how far it is, unless all is over in a moment."""
    if find_spec("tqdm") is None:
        return requests
    from tqdm import tqdm

    bar: Iterable[Request] = tqdm(
        requests, desc=name, unit=" requests", delay=1, disable=None, leave=False
    )
    return bar
