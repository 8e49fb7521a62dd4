"""Whether loading a prefix is faster than computing it, by measured rates of both."""

import time
from collections.abc import Callable

_WEIGHT = 0.25
"""Of a new measurement in the average."""
_MIN_STEP_TOKENS = 64
"""Steps of fewer tokens mostly generate, and say little of the rate of computing prompts."""
_MIN_DEADLINE_S, _FIRST_DEADLINE_S = 0.5, 10.0
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PROBE_S = 60.0


class LoadGate:
    """Decides on loads. Until both rates are known, loads are worth it.

    Where loads have become slower than computing, one is tried now and then. After a failed load,
    none is tried for a second, and for twice as long after each further one, up to a minute. So a
    damaged block costs little, and a disk that hangs is left alone.

    Args:
        min_tokens: the least tokens that a load is worth.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, min_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._min_tokens, self._clock = min_tokens, clock
        self._compute_rate = self._load_s = 0.0
        """Tokens that are computed in a second, and seconds in which a token is loaded."""
        self._paused_until, self._pause_s = 0.0, _PAUSE_S
        self._loaded_at = 0.0
        self.computed_s = 0.0
        """Seconds in which the engine has computed."""

    def note_computed(self, tokens: int, seconds: float) -> None:
        """Measure a step of the engine that computed so many tokens."""
        self.computed_s += seconds
        if tokens >= _MIN_STEP_TOKENS and seconds > 0:
            self._compute_rate = _average(self._compute_rate, tokens / seconds)

    def note_loaded(self, tokens: int, seconds: float) -> float:
        """Measure a load, by the seconds in which the engine computed nothing beside it.

        Returns the seconds that it saved; negative if computing would have been faster.
        """
        self._loaded_at, self._pause_s = self._clock(), _PAUSE_S
        self._load_s = _average(self._load_s, seconds / tokens)
        return tokens / self._compute_rate - seconds if self._compute_rate else 0.0

    def note_failed(self) -> None:
        """Note that a load failed, or took too long."""
        self._paused_until = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def is_worth(self, tokens: int) -> bool:
        """Return whether so many tokens should be loaded rather than computed."""
        now = self._clock()
        if tokens < self._min_tokens or now < self._paused_until:
            return False
        is_slower = self._load_s * self._compute_rate > 1
        return not is_slower or now > self._loaded_at + _PROBE_S

    def deadline_s(self, tokens: int) -> float:
        """Return the seconds after which a load is given up: those that computing would take."""
        if not self._compute_rate:
            return _FIRST_DEADLINE_S
        return max(tokens / self._compute_rate, _MIN_DEADLINE_S)


def _average(before: float, new: float) -> float:
    return before + _WEIGHT * (new - before) if before else new
