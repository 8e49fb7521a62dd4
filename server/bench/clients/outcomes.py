"""Tells from an answer's headers where it comes from: from which tier, or from the engine.

The outcomes of tierserve are `memory`, `disk`, `shared` (tiers), `stale`, `collapsed`, `miss`,
`request` (the client wanted a new answer), `revalidated` (a stale one was replaced) and `bypass`.
Other caches have `hit` and `miss`; an answer that tells nothing is `uncached`.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from math import nan
from typing import NamedTuple

FAILED = "failed"
"""The outcome of what has no whole answer."""
UNCACHED = "uncached"
OTHER = "other"
HITS = ("memory", "disk", "shared", "hit", "stale", "collapsed")
"""Outcomes for which no engine generated tokens."""
OUTCOMES = (*HITS, "miss", "request", "revalidated", "bypass", UNCACHED, OTHER, FAILED)
"""All, but for what a header of the user's choice names."""
MOST_NAMES = 32
"""Outcomes that are told apart; further ones are `other`."""
_OURS = "tierserve"
_BARE = r"[!#$%&'*+.^_`|~0-9A-Za-z:/-]+"
_VALUE = rf'"((?:[^"\\]|\\.)*)"|({_BARE})'
_member = re.compile(rf"\s*(?:{_VALUE})\s*").match
_parameter = re.compile(rf"\s*;\s*({_BARE})(?:=(?:{_VALUE}))?\s*").match
_escaped = re.compile(r"\\(.)")
_name = re.compile(r"[a-z0-9_.-]{1,32}").fullmatch
_loaded = re.compile(r"(\d{1,9}) prompt tokens from \w+").fullmatch
# RFC 9211, section 2.2, says why a cache asked further.
_FORWARDED = {
    "bypass": "bypass", "method": "bypass", "stale": "revalidated", "request": "request"
}  # fmt: skip
# What nginx and others say in `X-Cache`, or in place of a list in `Cache-Status`.
_WORDS = {
    "hit": "hit", "miss": "miss", "stale": "stale", "updating": "stale", "bypass": "bypass",
    "expired": "revalidated", "revalidated": "revalidated",
}  # fmt: skip
_word = re.compile(r"(?:.*[\s_-])?(hit|miss|stale|updating|bypass|expired|revalidated)\b").match


class Seen(NamedTuple):
    """What the headers of an answer tell."""

    outcome: str
    loaded_tokens: int
    age: float


def reads_headers(
    outcome_header: str | None = None,
) -> Callable[[list[tuple[bytes, bytes]]], Seen]:
    """Return what reads headers, their names in lower case.

    Args:
        outcome_header: its value is the outcome; None understands what caches send.
    """
    given = outcome_header.lower().encode() if outcome_header else b""
    names = {given or b"cache-status", b"cache-status", b"age", b"x-cache", b"x-litellm-cache-key"}

    def read(headers: list[tuple[bytes, bytes]]) -> Seen:
        found: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in names:
                found[name] = found[name] + b", " + value if name in found else value
        status, loaded = of_cache_status(found.get(b"cache-status", b""))
        age = found.get(b"age", b"")
        if given:
            outcome = _of_value(found[given]) if given in found else UNCACHED
        elif b"cache-status" in found:
            outcome = status
        elif b"x-cache" in found:
            outcome = _of_word(found[b"x-cache"]) or UNCACHED
        else:
            outcome = "hit" if found.get(b"x-litellm-cache-key") else UNCACHED
        return Seen(outcome, loaded, float(age) if age.isdigit() else nan)

    return read


@lru_cache(4096)
def of_cache_status(value: bytes) -> tuple[str, int]:
    """Return the outcome and the loaded prompt tokens of a `Cache-Status` (RFC 9211).

    The hit nearest to us counts; where all have asked further, the last tierserve tells why, or
    else the last cache. What can't be read is left out.
    """
    members = _members(value.decode("latin-1"))
    loaded = 0
    for name, parameters in members:
        if name == _OURS and (found := _loaded(parameters.get("detail", ""))):
            loaded = int(found[1])
    hits = [(name, given) for name, given in members if _is_hit(name, given)]
    ours = [(name, given) for name, given in members if name == _OURS]
    chosen = (hits or ours or members)[-1:]
    return (_outcome(*chosen[0]) if chosen else UNCACHED), loaded


class Outcomes:
    """Numbers for the names of outcomes, in the order in which they were seen."""

    def __init__(self) -> None:
        self.names = [FAILED]
        self._numbers = {FAILED: 0}

    def number(self, name: str) -> int:
        """Return the number of an outcome; many different ones share that of `other`."""
        number = self._numbers.get(name)
        if number is None:
            if len(self.names) >= MOST_NAMES and name != OTHER:
                return self.number(OTHER)
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        return number


def _members(text: str) -> list[tuple[str, dict[str, str]]]:
    """Return the members of a list of structured fields (RFC 9651), up to what isn't one."""
    members: list[tuple[str, dict[str, str]]] = []
    at = 0
    while (found := _member(text, at)) is not None:
        parameters: dict[str, str] = {}
        members.append((_text_of(*found.groups()), parameters))
        at = found.end()
        while (found := _parameter(text, at)) is not None:
            key, quoted, token = found.groups()
            parameters[key] = _text_of(quoted, token)
            at = found.end()
        if text[at : at + 1] != ",":
            break
        at += 1
    return members


def _text_of(quoted: str | None, token: str | None) -> str:
    return token or "" if quoted is None else _escaped.sub(r"\1", quoted)


def _is_hit(name: str, given: dict[str, str]) -> bool:
    # With `fwd` and `ttl`, a stale answer was given since nobody had a new one.
    return "hit" in given or (name == _OURS and "fwd" in given and "ttl" in given)


def _outcome(name: str, given: dict[str, str]) -> str:
    if not given:
        return _of_word(name.encode("latin-1")) or UNCACHED
    if _is_hit(name, given):
        if "fwd" in given or given.get("ttl", "").startswith("-"):
            return "stale"
        tier = given.get("detail", "") if name == _OURS else ""
        return tier if _name(tier) else "hit"
    if "collapsed" in given:
        return "collapsed"
    if "fwd" in given:
        return _FORWARDED.get(given["fwd"], "miss")
    return UNCACHED


@lru_cache(256)
def _of_word(value: bytes) -> str:
    found = _word(value.decode("latin-1").lower())
    return _WORDS[found[1]] if found else ""


@lru_cache(256)
def _of_value(value: bytes) -> str:
    name = value.decode("latin-1").strip().lower()
    return name if _name(name) else OTHER
