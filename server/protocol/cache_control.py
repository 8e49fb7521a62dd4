"""What a client says about caching: the request's `Cache-Control` (RFC 9111, section 5.2.1)."""

import re
from functools import lru_cache
from math import inf
from typing import NamedTuple, Self

from tiers import Entry, State

_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*(?:"([^"]*)"|([^\s",]*)))?')


class Control(NamedTuple):
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
    def is_about_age(self) -> bool:
        """Whether anything is said of how old an answer may be."""
        return self.max_age_s < inf or self.min_fresh_s > -inf or self.max_stale_s is not None

    @property
    def directives(self) -> list[str]:
        """What is said without a time, as in `Cache-Control`."""
        said = ("no-cache", self.no_cache), ("no-store", self.no_store)
        return [name for name, is_said in said if is_said]

    def and_also(self, other: Self) -> Self:
        """Return what both say; `other` may forbid, and says nothing of age."""
        return self._replace(
            no_cache=self.no_cache or other.no_cache,
            no_store=self.no_store or other.no_store,
            only_if_cached=self.only_if_cached or other.only_if_cached,
        )

    def takes(self, entry: Entry, state: State, now: float) -> bool:
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
        return state <= State.STALE and not self.is_about_age


@lru_cache(256)
def control_of(value: str) -> Control:
    """Read a `Cache-Control` header.

    What isn't known is ignored. A time that can't be read stands for the strictest: an answer that
    a client did not want is worse than one that is made anew.
    """
    said = directives(value)
    stale = said.get("max-stale")
    return Control(
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
