"""How long the answers of a route and a model are good for."""

from fnmatch import fnmatchcase
from functools import lru_cache

from server.config import Cache
from tiers import Freshness


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
