"""What a client says about caching: the request's `Cache-Control` (RFC 9111, section 5.2.1)."""

import logging
import re
from functools import lru_cache
from math import inf
from typing import NamedTuple, Self

from tiers import Entry, Freshness, State

logger = logging.getLogger(__name__)

_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*(?:"([^"]*)"|([^\s",]*)))?')


class CacheControl(NamedTuple):
    """Which answers a client takes. Times are in seconds."""

    no_cache: bool = False
    """Only a new answer."""
    no_store: bool = False
    """The answer isn't to be kept."""
    only_if_cached: bool = False
    """Only an answer that is there."""
    max_age_s: float = inf
    min_fresh_s: float = -inf
    max_stale_s: float | None = None

    @property
    def limits_age(self) -> bool:
        """Whether anything is said of how old an answer may be."""
        return self.max_age_s < inf or self.min_fresh_s > -inf or self.max_stale_s is not None

    @property
    def directives(self) -> list[str]:
        """What is said without a time, as in `Cache-Control`."""
        said = ("no-cache", self.no_cache), ("no-store", self.no_store)
        return [name for name, is_said in said if is_said]

    def merge(self, other: Self) -> Self:
        """Return what both say; `other` may forbid, and says nothing of age."""
        return self._replace(
            no_cache=self.no_cache or other.no_cache,
            no_store=self.no_store or other.no_store,
            only_if_cached=self.only_if_cached or other.only_if_cached,
        )

    def accepts(self, entry: Entry, state: State, now: float) -> bool:
        """Whether the client takes an entry in this state at `now` (Unix s)."""
        age_s, stale_s = now - entry.stored_at, now - entry.expires_at
        if self.no_cache or -stale_s < self.min_fresh_s:
            return False
        max_stale_s = self.max_stale_s or 0
        if age_s > self.max_age_s + max_stale_s:
            return False
        if stale_s <= max_stale_s:
            return True
        # Who says nothing of age gets what the server gives while a new one is made.
        return state <= State.STALE_WHILE_REVALIDATE and not self.limits_age


@lru_cache(256)
def parse_cache_control(value: str) -> CacheControl:
    """Read a `Cache-Control` header.

    What isn't known is ignored. A time that can't be read stands for the strictest: an answer that
    a client did not want is worse than one that is made anew.
    """
    said = directives(value)
    stale = said.get("max-stale")
    return CacheControl(
        no_cache="no-cache" in said,
        no_store="no-store" in said,
        only_if_cached="only-if-cached" in said,
        max_age_s=seconds(said["max-age"], 0) if "max-age" in said else inf,
        min_fresh_s=seconds(said["min-fresh"], inf) if "min-fresh" in said else -inf,
        # Without a time, any staleness will do.
        max_stale_s=inf if stale == "" else seconds(stale, 0) if stale is not None else None,
    )


def directives(value: str) -> dict[str, str]:
    """Return the directives of a `Cache-Control` header by name; the first of a name counts."""
    said: dict[str, str] = {}
    for name, quoted, plain in _DIRECTIVE.findall(value):
        said.setdefault(name.lower(), quoted or plain)
    return said


def seconds(text: str, unreadable: float) -> float:
    """Return a time as a directive has it, or else `unreadable`."""
    return float(text) if text.isascii() and text.isdecimal() else unreadable


# An upstream can't be asked whether an answer is still good, as `no-cache` demands.
_NOT_KEPT = frozenset({"no-cache", "no-store", "private"})


# Libraries for server-sent events put `no-cache` into each stream, whatever its answer.
_NOT_KEPT_OF_STREAMS = _NOT_KEPT - {"no-cache"}


# RFC 9111, section 5.2.2: a shared cache gives out no stale answer that has an `s-maxage` either.
_NEVER_STALE = frozenset({"must-revalidate", "proxy-revalidate", "s-maxage"})


@lru_cache(256)
def limit_freshness(control: str, ours: Freshness, *, is_stream: bool) -> Freshness | None:
    """Return how long an answer is good for whose `Cache-Control` is `control`: at most `ours`.

    `None` says that it isn't to be kept. Clients that ask for the same while it is generated share
    it even so: it is as new for them, and they have the same credentials.
    """
    theirs = directives(control)
    if not (_NOT_KEPT_OF_STREAMS if is_stream else _NOT_KEPT).isdisjoint(theirs):
        # Logged once, since the result is cached.
        logger.info("answers aren't kept of which an upstream says Cache-Control: %s", control)
        return None
    age = theirs.get("s-maxage", theirs.get("max-age"))
    ttl_s = ours.ttl_s if age is None else min(ours.ttl_s, seconds(age, 0))
    if not _NEVER_STALE.isdisjoint(theirs):
        return Freshness(ttl_s)
    return ours._replace(ttl_s=ttl_s)
