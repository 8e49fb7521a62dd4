"""Variants: several answers to a request that samples, given in turn.

One answer for each key would freeze sampling: ten equal requests would get the same text ten times.
With `k` variants the first `k` requests are generated, and later ones are hits.
"""

from collections import OrderedDict

from tiers.key import digest, scope_of, scoped

# 20 MB at most. A key that is dropped begins with its first variant again.
_MAX_KEYS = 64 * 1024


class Variants:
    """The next variant of each key."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, int] = OrderedDict()

    def next(self, key: str, count: int) -> str:
        """Return the key of the next of `count` variants; that of the first is `key` itself."""
        turn = self._turns.pop(key, 0) % count
        self._turns[key] = turn + 1
        if len(self._turns) > _MAX_KEYS:
            self._turns.popitem(last=False)
        return key if turn == 0 else scoped(scope_of(key), digest(key.encode(), b"%d" % turn))
