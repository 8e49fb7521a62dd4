"""Replays keys against a policy, and computes what the optimum and pure chance would do."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache

from tiers.policies import Policy

SEED_EXAMPLE = ("1", "2", "3", "4", "5", "1", "6", "7", "2", "3", "8", "9", "10", "11", "12")
"""The users of 15 requests, in order."""


class Replay:
    """A policy with the keys that it let in, each costing as many bytes."""

    def __init__(self, policy: Policy, cost: int = 1) -> None:
        self.policy, self.cost = policy, cost
        self.held: set[str] = set()

    def ask(self, keys: Iterable[str]) -> int:
        """Ask for each of `keys`, let in what was missing, and return the hits."""
        hits = 0
        for key in keys:
            if key in self.held:
                self.policy.access(key)
                hits += 1
                continue
            self.policy.insert(key, self.cost)
            self.held.add(key)
            if len(self.held) * self.cost > self.policy.max_bytes:
                self.held.remove(self.policy.evict())
        return hits


def count_hits(policy: Policy, keys: Iterable[str], cost: int = 1) -> int:
    """Return how many of `keys` an empty cache under `policy` finds."""
    return Replay(policy, cost).ask(keys)


def count_hits_of_optimum(capacity: int, keys: Sequence[str]) -> int:
    """Return the hits when what is asked for again last makes room (Belady, 1966)."""
    held: set[str] = set()
    hits = 0
    for now, key in enumerate(keys):
        rest = keys[now + 1 :]
        hits += key in held
        if key not in held and len(held) == capacity:
            held.remove(max(held, key=lambda one: rest.index(one) if one in rest else len(keys)))
        held.add(key)
    return hits


def count_most_hits(capacity: int, keys: Sequence[str]) -> int:
    """Return the most hits of all choices, that of not letting a key in among them."""

    @cache
    def hits_from(now: int, held: frozenset[str]) -> int:
        if now == len(keys):
            return 0
        key = keys[now]
        if key in held:
            return 1 + hits_from(now + 1, held)
        if len(held) < capacity:
            return max(hits_from(now + 1, held), hits_from(now + 1, held | {key}))
        return max(hits_from(now + 1, (held | {key}) - {one}) for one in held | {key})

    return hits_from(0, frozenset())


def expect_hits_of_random(capacity: int, keys: Sequence[str]) -> Fraction:
    """Return the mean hits when each entry is as likely to make room."""

    @cache
    def hits_from(now: int, held: frozenset[str]) -> Fraction:
        if now == len(keys):
            return Fraction(0)
        key = keys[now]
        if key in held:
            return 1 + hits_from(now + 1, held)
        if len(held) < capacity:
            return hits_from(now + 1, held | {key})
        after = (hits_from(now + 1, held - {one} | {key}) for one in held)
        return sum(after, Fraction(0)) / len(held)

    return hits_from(0, frozenset())
