"""Upstreams that get no requests because they have failed again and again."""

import math

from server.engine.routing.ejection import FAILURES
from server.engine.upstream import Upstream


def eject(upstream: Upstream) -> None:
    """Have an upstream fail until it is ejected: for ever, since a test may stand still."""
    upstream._ejection._out_s = math.inf
    for _ in range(FAILURES):
        upstream._note_failure()
