"""Each scope's share of the memory tier, which a policy alone would give to whoever asks most."""

from collections import OrderedDict

from tiers.key import SCOPE_LENGTH, scope_of


class Shares:
    """What each scope holds: it loses nothing while that is less than an equal part of all.

    Keys without a scope cost nothing here. Where the policy would evict what a scope is entitled
    to, another's leaves that was asked for longest ago.
    """

    OVERHEAD_BYTES = 150
    """The most that was measured to be taken per key with a scope."""

    def __init__(self) -> None:
        self.keys_by_scope: dict[str, OrderedDict[str, None]] = {}
        """Scope to its keys, the one that was asked for longest ago first."""
        self._bytes: dict[str, int] = {}
        self._total = 0
        self._greedy = ""

    def insert(self, key: str, size: int) -> None:
        """Take in a key whose entry costs `size` bytes."""
        if scope := scope_of(key):
            self.keys_by_scope.setdefault(scope, OrderedDict())[key] = None
            self._add(scope, size)

    def access(self, key: str) -> None:
        """Note that a key was asked for."""
        if (keys := self.keys_by_scope.get(key[:SCOPE_LENGTH])) is not None and key in keys:
            keys.move_to_end(key)

    def remove(self, key: str, size: int) -> None:
        """Take out a key whose entry costs `size` bytes."""
        if scope := scope_of(key):
            keys = self.keys_by_scope[scope]
            del keys[key]
            self._add(scope, -size)
            if not keys:
                del self.keys_by_scope[scope], self._bytes[scope]

    def instead_of(self, victim: str | None) -> str | None:
        """Return the key that leaves in place of one that may stay; `None` if that may leave."""
        scope = scope_of(victim or "")
        if not scope or self._is_over(scope):
            return None
        # Whoever was over its share mostly still is: few evictions look at all scopes.
        if self._greedy not in self.keys_by_scope or not self._is_over(self._greedy):
            self._greedy = max(self._bytes, key=self._bytes.__getitem__)
        return next(iter(self.keys_by_scope[self._greedy]))

    def _is_over(self, scope: str) -> bool:
        return self._bytes[scope] * len(self._bytes) >= self._total

    def _add(self, scope: str, size: int) -> None:
        self._bytes[scope] = self._bytes.get(scope, 0) + size
        self._total += size
