"""Each scope's share of the memory tier, which no other scope's requests can take from it."""

from collections import OrderedDict

from tiers.key import SCOPE_LENGTH, scope_of


class Shares:
    """What each scope holds. A scope loses nothing while it holds less than an equal part of all.

    Keys without a scope aren't counted. If the policy would evict an entry that its scope is
    entitled to, the least recently requested entry of a scope over its share leaves instead.
    """

    OVERHEAD_BYTES = 150
    """The most memory that a key with a scope was measured to take here."""

    def __init__(self) -> None:
        self.is_empty = True
        """Whether no key has a scope. An attribute, since every hit reads it."""
        # Scope to its keys, the least recently requested first.
        self._keys: dict[str, OrderedDict[str, None]] = {}
        self._bytes: dict[str, int] = {}
        self._total = 0
        self._largest = ""

    def insert(self, key: str, size: int) -> None:
        """Add a key whose entry costs `size` bytes."""
        if scope := scope_of(key):
            self._keys.setdefault(scope, OrderedDict())[key] = None
            self.is_empty = False
            self._add_bytes(scope, size)

    def access(self, key: str) -> None:
        """Record a request for a key."""
        if (keys := self._keys.get(key[:SCOPE_LENGTH])) is not None and key in keys:
            keys.move_to_end(key)

    def remove(self, key: str, size: int) -> None:
        """Remove a key whose entry costs `size` bytes."""
        if scope := scope_of(key):
            keys = self._keys[scope]
            del keys[key]
            self._add_bytes(scope, -size)
            if not keys:
                del self._keys[scope], self._bytes[scope]
                self.is_empty = not self._keys

    def instead_of(self, victim: str | None) -> str | None:
        """Return the key that leaves instead of `victim`, or `None` if `victim` may leave."""
        scope = scope_of(victim or "")
        if not scope or self._is_over(scope):
            return None
        # A scope that was over its share mostly still is, so few evictions compare all scopes.
        if self._largest not in self._keys or not self._is_over(self._largest):
            self._largest = max(self._bytes, key=self._bytes.__getitem__)
        return next(iter(self._keys[self._largest]))

    def _is_over(self, scope: str) -> bool:
        return self._bytes[scope] * len(self._bytes) >= self._total

    def _add_bytes(self, scope: str, size: int) -> None:
        self._bytes[scope] = self._bytes.get(scope, 0) + size
        self._total += size
