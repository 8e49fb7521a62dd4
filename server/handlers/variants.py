"""Variants: several answers to a request that asks for chance, given out in turn.

With one answer for each key, sampling would be frozen: who asks ten times would get the same text
ten times. With `k` variants the first `k` times are generated, and what follows are hits.
"""

from collections import OrderedDict

from tiers.key import digest, scope_of, scoped

# Keys of which the turn is known: 20 MB at most. Who is forgotten begins with the first again.
_REMEMBERED = 64 * 1024


class Variants:
    """Whose turn it is, of the variants of each key."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, int] = OrderedDict()

    def next(self, key: str, count: int) -> str:
        """Return the key of the next of `count` variants; that of the first is `key` itself."""
        turn = self._turns.pop(key, 0) % count
        self._turns[key] = turn + 1
        if len(self._turns) > _REMEMBERED:
            self._turns.popitem(last=False)
        return key if turn == 0 else scoped(scope_of(key), digest(key.encode(), b"%d" % turn))
