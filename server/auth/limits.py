"""The rate limits of one tenant, and counts of its requests.

Requests per minute are a token bucket: the requests of one minute may come at once, and are there
again a minute later. A request beyond a limit is refused with the seconds after which to retry.
Of the libraries, aiolimiter and pyrate-limiter make callers wait, and `limits` refuses but counts
by fixed or moving windows.
"""

import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

_MINUTE_S = 60.0
# Sums of seconds may be wrong by this much.
_ROUNDING_S = 1e-6


class Limits(NamedTuple):
    """The limits of one tenant; `None` stands for no limit."""

    requests_per_minute: int | None = None
    max_requests: int | None = None
    """How many requests may be under way at once."""


class RateLimited(NamedTuple):
    """A request beyond a limit."""

    text: str
    """The limit, for the client."""
    retry_after_s: int
    """Seconds after which the request may come again."""


class _Bucket:
    """A token bucket that holds `per_minute` requests and fills within a minute.

    Its only state is the moment at which it is full: the generic cell rate algorithm (ITU-T I.371).
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
        """Return the state of the bucket as OpenAI's headers."""
        missing_s = self._missing_s()
        left = int((_MINUTE_S - missing_s + _ROUNDING_S) / self._one_s)
        return {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": duration(missing_s),
        }


class RateLimiter:
    """Limits and counts the requests of one tenant. It outlives changes of keys and limits.

    Args:
        limits: the limits.
        clock: returns monotonic seconds.
    """

    __slots__ = ("_bucket", "_clock", "_max_requests", "active", "refused", "requests")

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket: _Bucket | None = None
        self.active = self.requests = 0
        self.refused = {"requests_per_minute": 0, "max_requests": 0}
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Apply these limits from now on."""
        self._max_requests, per_minute = limits.max_requests, limits.requests_per_minute
        if per_minute is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.per_minute != per_minute:
            self._bucket = _Bucket(per_minute, self._clock)

    def acquire(self) -> RateLimited | None:
        """Count a request that begins, which `release` must follow, or return why it is refused."""
        if self._max_requests is not None and self.active >= self._max_requests:
            self.refused["max_requests"] += 1
            return RateLimited(
                f"At most {self._max_requests} requests may be under way at once.", 1
            )
        if (bucket := self._bucket) is not None and (wait_s := bucket.take()):
            self.refused["requests_per_minute"] += 1
            text = f"At most {bucket.per_minute} requests per minute are allowed."
            return RateLimited(text, _round_up(wait_s))
        self.active += 1
        self.requests += 1
        return None

    def release(self) -> None:
        """Count the end of a request that `acquire` let begin."""
        self.active -= 1

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of each response that describe the limits."""
        return {} if self._bucket is None else self._bucket.headers()


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: `20ms`, `7s`, `6m0s`; rounded up."""
    if seconds < 1:
        return f"{_round_up(seconds * 1000)}ms"
    minutes, rest = divmod(_round_up(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _round_up(number: float) -> int:
    return ceil(number - _ROUNDING_S)
