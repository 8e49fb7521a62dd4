"""How long the answers of a route and a model are good for."""

from fnmatch import fnmatchcase
from functools import lru_cache

from server import config
from tiers import Freshness


class FreshnessRules:
    """The rules of the configuration, of which the first that matches counts."""

    def __init__(self, cache: config.Cache) -> None:
        self._cache = cache
        # Clients choose the model's name, so what is remembered is bounded.
        self.of = lru_cache(1024)(self._of)

    def _of(self, route: str, model: str) -> Freshness:
        matching = (
            rule
            for rule in self._cache.rules
            if fnmatchcase(route, rule.route) and fnmatchcase(model, rule.model)
        )
        chosen: config.Freshness = next(matching, self._cache)
        return Freshness(chosen.ttl_s, chosen.stale_while_revalidate_s, chosen.stale_if_error_s)
