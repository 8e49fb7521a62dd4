"""`Cache-Control` of requests and of upstreams' responses (RFC 9111, section 5.2).

`lru_cache` is safe here: it holds short texts and values only.
"""

import logging
import re
from fnmatch import fnmatchcase
from functools import lru_cache
from math import inf
from typing import NamedTuple, Self

from server.config.schema import CacheConfig
from tiers import (
    Freshness,
)  # fmt: skip
from tiers.acceptance import ANY, Acceptance

logger = logging.getLogger(__name__)

_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*(?:"([^"]*)"|([^\s",]*)))?')


class CacheControl(NamedTuple):
    """The `Cache-Control` of a request."""

    acceptance: Acceptance = ANY
    """Which answers it accepts."""
    no_store: bool = False
    """The answer must not be stored."""

    @property
    def directives(self) -> list[str]:
        """The directives without a time, as `Cache-Control` has them."""
        given = ("no-cache", self.acceptance.no_cache), ("no-store", self.no_store)
        return [name for name, is_given in given if is_given]

    def merge(self, other: Self) -> Self:
        """Return what both demand; `other` limits no age."""
        mine, theirs = self.acceptance, other.acceptance
        return self._replace(
            acceptance=mine._replace(
                no_cache=mine.no_cache or theirs.no_cache,
                only_if_cached=mine.only_if_cached or theirs.only_if_cached,
            ),
            no_store=self.no_store or other.no_store,
        )


NO_CACHE = CacheControl(Acceptance(no_cache=True))
"""Asks for an answer that is generated now."""


@lru_cache(256)
def parse_cache_control(value: str) -> CacheControl:
    """Read a request's `Cache-Control`.

    Unknown directives are ignored. A time that can't be read counts as the strictest one: an answer
    that a client did not want is worse than one that is generated again.
    """
    given = directives(value)
    stale = given.get("max-stale")
    acceptance = Acceptance(
        no_cache="no-cache" in given,
        only_if_cached="only-if-cached" in given,
        max_age_s=seconds(given["max-age"], 0) if "max-age" in given else inf,
        min_fresh_s=seconds(given["min-fresh"], inf) if "min-fresh" in given else -inf,
        # Without a time, any staleness is accepted.
        max_stale_s=inf if stale == "" else seconds(stale, 0) if stale is not None else None,
    )
    return CacheControl(acceptance, no_store="no-store" in given)


def directives(value: str) -> dict[str, str]:
    """Return the values of `Cache-Control`'s directives by name; the first of a name counts."""
    found: dict[str, str] = {}
    for name, quoted, plain in _DIRECTIVE.findall(value):
        found.setdefault(name.lower(), quoted or plain)
    return found


def seconds(text: str, unreadable: float) -> float:
    """Return the value of a directive in seconds, or `unreadable` where it has none."""
    return float(text) if text.isascii() and text.isdecimal() else unreadable


# `no-cache` demands revalidation by the upstream, which no upstream of ours supports.
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


class FreshnessRules:
    """The rules of the configuration; the first one that matches a route and a model counts."""

    def __init__(self, cache: CacheConfig) -> None:
        self._cache = cache
        # There are few routes, and few models.
        self.of = lru_cache(1024)(self._of)

    def _of(self, route: str, model: str) -> Freshness:
        cache = self._cache
        default = Freshness(cache.ttl_s, cache.stale_while_revalidate_s, cache.stale_if_error_s)
        for rule in cache.rules:
            if fnmatchcase(route, rule.route) and fnmatchcase(model, rule.model):
                times = (rule.ttl_s, rule.stale_while_revalidate_s, rule.stale_if_error_s)
                pairs = zip(times, default, strict=True)
                return Freshness(*(own if own is not None else base for own, base in pairs))
        return default
