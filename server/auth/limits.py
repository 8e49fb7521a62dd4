"""What one tenant may ask at once and per minute, and what it has asked.

Requests per minute are a token bucket: a minute's worth may come at once, and is there again a
minute later. Libraries for it, such as aiolimiter and pyrate-limiter, have callers wait; here
they are refused, and told when to come again.
"""

import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

_MINUTE_S = 60.0
# By so much sums of seconds may be wrong.
_ROUNDING_S = 1e-6


class Limits(NamedTuple):
    """Limits of one tenant; `None` is without."""

    requests_per_minute: int | None = None
    max_requests: int | None = None
    """Under way at once."""


class RateLimited(NamedTuple):
    """Why a request may not be made now, for its client, and in how many seconds it may."""

    text: str
    retry_after_s: int


class _Bucket:
    """A token bucket that holds `per_minute` requests and is filled within a minute.

    Kept as the moment at which it is full, as the generic cell rate algorithm does (ITU-T I.371).
    """

    __slots__ = ("_clock", "_full_at", "_one_s", "per_minute")

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._one_s = _MINUTE_S / per_minute
        self._full_at = clock()

    def _missing_s(self) -> float:
        return max(0.0, self._full_at - self._clock())

    def take(self) -> float:
        """Take a request out, or return the seconds until there is one."""
        missing_s = self._missing_s() + self._one_s
        if (wait_s := missing_s - _MINUTE_S) > _ROUNDING_S:
            return wait_s
        self._full_at = self._clock() + missing_s
        return 0.0

    def headers(self) -> Mapping[str, str]:
        """Return what OpenAI's clients are told, under OpenAI's names."""
        missing_s = self._missing_s()
        left = int((_MINUTE_S - missing_s + _ROUNDING_S) / self._one_s)
        return {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": duration(missing_s),
        }


class RateLimiter:
    """What one tenant has asked, kept while its keys and limits change.

    Args:
        limits: what it may ask.
        clock: returns seconds that only go forwards.
    """

    __slots__ = ("_bucket", "_clock", "_most", "active", "refused", "requests")

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket: _Bucket | None = None
        self.active = self.requests = 0
        self.refused = {"requests_per_minute": 0, "max_requests": 0}
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Go on with these limits."""
        self._most, per_minute = limits.max_requests, limits.requests_per_minute
        if per_minute is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.per_minute != per_minute:
            self._bucket = _Bucket(per_minute, self._clock)

    def acquire(self) -> RateLimited | None:
        """Count a request that begins, or return why it may not; `leave` has to follow one."""
        if self._most is not None and self.active >= self._most:
            self.refused["max_requests"] += 1
            return RateLimited(f"At most {self._most} requests may be under way at once.", 1)
        if (bucket := self._bucket) is not None and (wait_s := bucket.take()):
            self.refused["requests_per_minute"] += 1
            text = f"At most {bucket.per_minute} requests per minute are allowed."
            return RateLimited(text, _up(wait_s))
        self.active += 1
        self.requests += 1
        return None

    def release(self) -> None:
        """Count a request that has ended."""
        self.active -= 1

    @property
    def headers(self) -> Mapping[str, str]:
        """What each answer tells of the limits."""
        return {} if self._bucket is None else self._bucket.headers()


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: `20ms`, `7s`, `6m0s`; rounded up."""
    if seconds < 1:
        return f"{_up(seconds * 1000)}ms"
    minutes, rest = divmod(_up(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _up(number: float) -> int:
    return ceil(number - _ROUNDING_S)
