"""`Cache-Control` (RFC 9111): of requests in section 5.2.1, of upstreams' responses in 5.2.2.

The caches of functions here map text to values, and keep nothing else alive.
"""

import logging
import re
from functools import lru_cache
from math import inf
from typing import NamedTuple, Self

from tiers import Entry, Freshness, State

logger = logging.getLogger(__name__)

_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*(?:"([^"]*)"|([^\s",]*)))?')


class CacheControl(NamedTuple):
    """Which answers a client accepts. Times are in seconds."""

    no_cache: bool = False
    """It accepts new answers only."""
    no_store: bool = False
    """The answer must not be stored."""
    only_if_cached: bool = False
    """It accepts stored answers only."""
    max_age_s: float = inf
    min_fresh_s: float = -inf
    max_stale_s: float | None = None

    @property
    def limits_age(self) -> bool:
        """Whether the client limits how old an answer may be."""
        return self.max_age_s < inf or self.min_fresh_s > -inf or self.max_stale_s is not None

    @property
    def directives(self) -> list[str]:
        """The directives for caches on the way to the engine, as in `Cache-Control`."""
        flags = ("no-cache", self.no_cache), ("no-store", self.no_store)
        return [name for name, is_set in flags if is_set]

    def merge(self, other: Self) -> Self:
        """Return the directives of both; `other` has none with a time."""
        return self._replace(
            no_cache=self.no_cache or other.no_cache,
            no_store=self.no_store or other.no_store,
            only_if_cached=self.only_if_cached or other.only_if_cached,
        )

    def accepts(self, entry: Entry, state: State, now: float) -> bool:
        """Whether the client accepts an entry in this state at `now` (Unix s)."""
        age_s, stale_s = now - entry.stored_at, now - entry.expires_at
        if self.no_cache or -stale_s < self.min_fresh_s:
            return False
        max_stale_s = self.max_stale_s or 0
        if age_s > self.max_age_s + max_stale_s:
            return False
        if stale_s <= max_stale_s:
            return True
        # A client that sets no limit gets a stale answer while the server makes a new one.
        return state <= State.STALE_WHILE_REVALIDATE and not self.limits_age


@lru_cache(256)
def parse_cache_control(value: str) -> CacheControl:
    """Read a request's `Cache-Control`.

    Unknown directives are ignored. A time that can't be read counts as the strictest one: an answer
    that a client did not want is worse than one that is generated again.
    """
    found = directives(value)
    stale = found.get("max-stale")
    return CacheControl(
        no_cache="no-cache" in found,
        no_store="no-store" in found,
        only_if_cached="only-if-cached" in found,
        max_age_s=seconds(found["max-age"], 0) if "max-age" in found else inf,
        min_fresh_s=seconds(found["min-fresh"], inf) if "min-fresh" in found else -inf,
        # Without a time, any staleness is accepted.
        max_stale_s=inf if stale == "" else seconds(stale, 0) if stale is not None else None,
    )


def directives(value: str) -> dict[str, str]:
    """Return the values of `Cache-Control`'s directives by name; the first of a name counts."""
    found: dict[str, str] = {}
    for name, quoted, plain in _DIRECTIVE.findall(value):
        found.setdefault(name.lower(), quoted or plain)
    return found


def seconds(text: str, unreadable: float) -> float:
    """Return the value of a directive in seconds, or `unreadable` where it has none."""
    return float(text) if text.isascii() and text.isdecimal() else unreadable


# `no-cache` demands to ask the upstream whether the answer is still good, and upstreams can't tell.
_NOT_KEPT = frozenset({"no-cache", "no-store", "private"})
# Libraries for server-sent events put `no-cache` into each stream, whatever its answer.
_NOT_KEPT_OF_STREAMS = _NOT_KEPT - {"no-cache"}
# With `s-maxage`, too, a shared cache gives out no stale answer (RFC 9111, section 5.2.2).
_NEVER_STALE = frozenset({"must-revalidate", "proxy-revalidate", "s-maxage"})


@lru_cache(256)
def limit_freshness(control: str, ours: Freshness, *, is_stream: bool) -> Freshness | None:
    """Return how long an upstream's answer stays fresh: at most `ours`.

    `None` means that the answer isn't stored. Clients that send the same request while it is
    generated share it even so: it is as new for them, and they have the same credentials.

    Args:
        control: the `Cache-Control` of the response.
        ours: as configured.
        is_stream: whether the response is a stream.
    """
    found = directives(control)
    if not (_NOT_KEPT_OF_STREAMS if is_stream else _NOT_KEPT).isdisjoint(found):
        # Logged once for each value, since results are remembered.
        logger.info("answers with the upstream's Cache-Control: %s aren't stored", control)
        return None
    age = found.get("s-maxage", found.get("max-age"))
    ttl_s = ours.ttl_s if age is None else min(ours.ttl_s, seconds(age, 0))
    if not _NEVER_STALE.isdisjoint(found):
        return Freshness(ttl_s)
    return ours._replace(ttl_s=ttl_s)
