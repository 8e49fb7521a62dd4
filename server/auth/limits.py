"""The rate limits of one tenant, and counts of its requests.

Requests per minute are a token bucket: the requests of one minute may come at once, and are there
again a minute later. Its only state is the moment at which it is full: the generic cell rate
algorithm (ITU-T I.371). A request beyond a limit is refused with the seconds after which to retry.
Of the libraries, aiolimiter and pyrate-limiter make callers wait, and `limits` refuses but counts
by fixed or moving windows.
"""

import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple, Protocol

_MINUTE_S = 60.0
# Sums of seconds may be wrong by this much.
_ROUNDING_S = 1e-6


class Limits(NamedTuple):
    """The limits of one tenant; `None` stands for no limit."""

    requests_per_minute: int | None = None
    max_requests: int | None = None
    """How many requests may be under way at once."""


NO_LIMITS = Limits()


class RateLimited(NamedTuple):
    """A request beyond a limit."""

    text: str
    """The limit, for the client."""
    retry_after_s: int
    """Seconds after which the request may come again."""
    limit: str
    """The limit's name, a field of `Limits`."""


def refusal(limits: Limits, active: int, full_at: float, now: float) -> RateLimited | None:
    """Return why a request is refused; `None` if it may begin.

    Args:
        limits: apply to it.
        active: how many requests are under way.
        full_at: when the bucket is full.
        now: the time, by the same clock.
    """
    per_minute, most = limits
    if most is not None and active >= most:
        text = f"At most {most} requests may be under way at once."
        return RateLimited(text, 1, "max_requests")
    if per_minute is not None and full_at > now:
        wait_s = full_at - now + _MINUTE_S / per_minute - _MINUTE_S
        if wait_s > _ROUNDING_S:
            text = f"At most {per_minute} requests per minute are allowed."
            return RateLimited(text, _round_up(wait_s), "requests_per_minute")
    return None


def full_after(per_minute: int, full_at: float, now: float) -> float:
    """Return when a bucket is full after one more request has begun."""
    return max(full_at, now) + _MINUTE_S / per_minute


class LimitUsage(Protocol):
    """How much of its limits one tenant or model uses; perhaps shared by processes."""

    @property
    def active(self) -> int:
        """How many requests are under way, in all processes."""

    @property
    def full_at(self) -> float:
        """When the bucket is full."""

    def begin(self, limits: Limits, now: float) -> RateLimited | None:
        """Count a request that begins, which `end` must follow, or return why it is refused."""

    def end(self) -> None:
        """Count the end of a request."""

    def close(self) -> None:
        """Stop counting; requests under way don't count any more."""


class LocalUsage:
    """The usage in one process.

    Args:
        active: how many requests are under way already.
    """

    __slots__ = ("active", "full_at")

    def __init__(self, active: int = 0) -> None:
        self.active, self.full_at = active, 0.0

    def begin(self, limits: Limits, now: float) -> RateLimited | None:
        """Count a request that begins, which `end` must follow, or return why it is refused."""
        refused = refusal(limits, self.active, self.full_at, now)
        if refused is None:
            self.active += 1
            if limits.requests_per_minute is not None:
                self.full_at = full_after(limits.requests_per_minute, self.full_at, now)
        return refused

    def end(self) -> None:
        """Count the end of a request."""
        self.active -= 1

    def close(self) -> None:
        """Do nothing: nobody shares it."""


class RateLimiter:
    """Limits and counts the requests of one tenant. It outlives changes of keys and limits.

    Args:
        limits: the limits.
        clock: returns monotonic seconds; the same in all processes that share the usage.
        new_usage: makes the usage, which is needed only with limits, of the number of requests
            under way.
    """

    __slots__ = ("_clock", "_limits", "_new_usage", "_usage", "active", "refused", "requests")

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        new_usage: Callable[[int], LimitUsage] = LocalUsage,
    ) -> None:
        self._clock, self._new_usage = clock, new_usage
        self._usage: LimitUsage | None = None
        self.active = self.requests = 0
        """Requests of this process: those under way, and all that were let begin."""
        self.refused = {"requests_per_minute": 0, "max_requests": 0}
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Apply these limits from now on. What is used stays used while there is any limit."""
        if limits == NO_LIMITS:
            if self._usage is not None:
                self._usage.close()
            self._usage = None
        elif self._usage is None:
            self._usage = self._new_usage(self.active)
        self._limits = limits

    def check(self) -> RateLimited | None:
        """Return why a request would be refused now; counts nothing."""
        usage = self._usage
        if usage is None:
            return None
        return refusal(self._limits, usage.active, usage.full_at, self._clock())

    def acquire(self) -> RateLimited | None:
        """Count a request that begins, which `release` must follow, or return why it is refused."""
        usage = self._usage
        if usage is not None and (refused := usage.begin(self._limits, self._clock())):
            self.refused[refused.limit] += 1
            return refused
        self.active += 1
        self.requests += 1
        return None

    def release(self) -> None:
        """Count the end of a request that `acquire` let begin."""
        self.active -= 1
        if self._usage is not None:
            self._usage.end()

    @property
    def headers(self) -> Mapping[str, str]:
        """OpenAI's headers of each response, which describe the bucket."""
        usage, per_minute = self._usage, self._limits.requests_per_minute
        if usage is None or per_minute is None:
            return {}
        missing_s = max(0.0, usage.full_at - self._clock())
        left = int((_MINUTE_S - missing_s + _ROUNDING_S) * per_minute / _MINUTE_S)
        return {
            "x-ratelimit-limit-requests": str(per_minute),
            "x-ratelimit-remaining-requests": str(max(0, left)),
            "x-ratelimit-reset-requests": duration(missing_s),
        }


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: `20ms`, `7s`, `6m0s`; rounded up."""
    if seconds < 1:
        return f"{_round_up(seconds * 1000)}ms"
    minutes, rest = divmod(_round_up(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _round_up(number: float) -> int:
    return ceil(number - _ROUNDING_S)
