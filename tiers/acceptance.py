"""Which answers a caller accepts, in the terms of HTTP caching (RFC 9111, section 5.2.1)."""

from math import inf
from typing import NamedTuple

from tiers.entry import Entry, State


class Acceptance(NamedTuple):
    """What a caller accepts; by default all that the tiers serve without being asked for more.

    Times are in seconds.
    """

    no_cache: bool = False
    """Only an answer that is generated now."""
    only_if_cached: bool = False
    """Only an answer that a tier holds."""
    max_age_s: float = inf
    min_fresh_s: float = -inf
    max_stale_s: float | None = None

    @property
    def limits_age(self) -> bool:
        """Whether it limits the age of an answer."""
        return self.max_age_s < inf or self.min_fresh_s > -inf or self.max_stale_s is not None

    def accepts(self, entry: Entry, state: State, now: float) -> bool:
        """Return whether an entry that is in this state at `now` (Unix s) will do."""
        age_s, stale_s = now - entry.stored_at, now - entry.expires_at
        if self.no_cache or -stale_s < self.min_fresh_s:
            return False
        max_stale_s = self.max_stale_s or 0
        if age_s > self.max_age_s + max_stale_s:
            return False
        if stale_s <= max_stale_s:
            return True
        # A caller without a limit also gets what the tiers serve while they revalidate.
        return state <= State.STALE_WHILE_REVALIDATE and not self.limits_age


ANY = Acceptance()
