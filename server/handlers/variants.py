"""Variants: several answers to a request that samples, given in turn.

One answer for each key would freeze sampling: ten equal requests would get the same text ten times.
With `k` variants the first `k` requests are generated, and later ones are hits.
"""

from mmap import mmap
from zlib import crc32

from tiers.key import digest, scope_of, scoped

# Of a million pairs of keys a quarter of one shares a turn.
_TURNS = 4 * 1024**2


class Variants:
    """The next variant of each key.

    Two processes that ask at the same moment may get the same variant.

    Args:
        turns: holds the next variant of each key in a byte, found by a digest of the key; processes
            may share it. Keys of the same digest share a turn.
    """

    def __init__(self, turns: memoryview | None = None) -> None:
        self._turns = memoryview(mmap(-1, _TURNS)) if turns is None else turns

    def next(self, key: str, count: int) -> str:
        """Return the key of the next of `count` variants; that of the first is `key` itself."""
        # Another process finds the same place, unlike by `hash`.
        place = crc32(key.encode()) % len(self._turns)
        turn = self._turns[place] % count
        self._turns[place] = turn + 1
        return key if turn == 0 else scoped(scope_of(key), digest(key.encode(), b"%d" % turn))
