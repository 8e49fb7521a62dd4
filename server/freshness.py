"""How long the answers of a route and a model are good for, by our rules and their upstream's."""

import logging
from fnmatch import fnmatchcase
from functools import lru_cache

from server.config.schema import Cache
from server.protocol.cache_control import directives, seconds
from tiers import Freshness

logger = logging.getLogger(__name__)

# An upstream can't be asked whether an answer is still good, as `no-cache` demands.
_NOT_KEPT = frozenset({"no-cache", "no-store", "private"})
# Libraries for server-sent events put `no-cache` into each stream, whatever its answer.
_NOT_KEPT_OF_STREAMS = _NOT_KEPT - {"no-cache"}
# RFC 9111, section 5.2.2: a shared cache gives out no stale answer that has an `s-maxage` either.
_NEVER_STALE = frozenset({"must-revalidate", "proxy-revalidate", "s-maxage"})


class FreshnessRules:
    """The rules of the configuration, of which the first that matches counts."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        # Of routes there are few, of names as many as the engine has.
        self.of = lru_cache(1024)(self._of)

    def _of(self, route: str, model: str) -> Freshness:
        cache = self._cache
        default = Freshness(cache.ttl_s, cache.stale_while_revalidate_s, cache.stale_if_error_s)
        for rule in cache.rules:
            if fnmatchcase(route, rule.route) and fnmatchcase(model, rule.model):
                said = (rule.ttl_s, rule.stale_while_revalidate_s, rule.stale_if_error_s)
                pairs = zip(said, default, strict=True)
                return Freshness(*(ours if ours is not None else theirs for ours, theirs in pairs))
        return default


@lru_cache(256)
def heeding(control: str, ours: Freshness, *, is_stream: bool) -> Freshness | None:
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
