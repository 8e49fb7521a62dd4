"""Requests that anybody can send any number of, counted, so that a flood becomes few lines."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from server.audit.actor import Actor

MAX_GROUPS = 16
"""How many groups of an act are told apart at a time; all others are counted together."""
_PATH_CHARACTERS = 256
_OTHERS = "others"


class CountedAct(NamedTuple):
    """Requests of one group."""

    act: str
    result: str
    actor: Actor
    """Of the last one."""
    what: dict[str, Any]
    requests: int


class _Group(NamedTuple):
    act: str
    who: str
    source: str
    path: str


class CountedRequests:
    """Counts requests by act, tenant, address and path, until they are taken.

    So whoever sends them determines at most `MAX_GROUPS` lines of each act, and one more, however
    many they are and however they vary.
    """

    def __init__(self) -> None:
        self._groups: dict[_Group, CountedAct] = {}
        self._groups_of: Counter[str] = Counter()

    def add(self, act: str, result: str, actor: Actor, path: str, at: str) -> None:
        """Count a request; `at` is the time as lines have it."""
        group = _Group(act, actor.who, actor.source, path[:_PATH_CHARACTERS])
        if group not in self._groups and self._groups_of[act] >= MAX_GROUPS:
            group, actor = _Group(act, _OTHERS, _OTHERS, _OTHERS), Actor(_OTHERS, source=_OTHERS)
        if (before := self._groups.get(group)) is None:
            self._groups_of[act] += 1
            what = {"path": group.path, "since": at}
            self._groups[group] = CountedAct(act, result, actor, what, 1)
        else:
            self._groups[group] = before._replace(actor=actor, requests=before.requests + 1)

    def take(self) -> Iterator[CountedAct]:
        """Yield what was counted, and count anew."""
        groups, self._groups = self._groups, {}
        self._groups_of.clear()
        yield from groups.values()
