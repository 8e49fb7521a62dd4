"""Ejection of outliers: an upstream that fails again and again gets no requests for a while.

It may well answer probes: only its answers show that something is wrong. After each ejection that
follows another without an answer between them, it is out for twice as long.
"""

import time
from collections.abc import Callable

FAILURES = 5
"""So many failures one after the other eject an upstream."""
FIRST_S, LONGEST_S = 5.0, 120.0
"""For how long it is out at first, and at most."""


class Ejection:
    """The failures of one upstream in a row.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.clear()

    @property
    def is_out(self) -> bool:
        """Whether it gets no requests now."""
        return self._clock() < self._until

    def clear(self) -> None:
        """Forget all failures: it has answered, or it was started anew."""
        self._failures, self._out_s, self._until = 0, FIRST_S, 0.0

    def note_failure(self) -> bool:
        """Count a failure; return whether it is ejected for it."""
        self._failures += 1
        if self._failures < FAILURES or self.is_out:
            return False
        self._until = self._clock() + self._out_s
        self._out_s = min(2 * self._out_s, LONGEST_S)
        return True
