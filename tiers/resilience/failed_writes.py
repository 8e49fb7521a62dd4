"""The writes that a tier has lost: the entries that they should have replaced are hidden."""

from math import inf

_MAX_KEYS = 16 * 1024


class FailedWrites:
    """Keys under which a tier may hold an entry older than the last that was written or removed.

    Invariant: it knows at most `max_keys` keys. When it forgets one, every entry that was stored
    before that key's write counts as stale, whatever its key.

    Args:
        max_keys: each takes about 200 bytes.
    """

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self.is_empty = True
        """Whether no entry is hidden. An attribute, since every hit reads it."""
        self._max_keys = max_keys
        self._latest: dict[str, float] = {}
        self._trusted_from = -inf

    def add(self, key: str, stored_at: float) -> None:
        """Hide the entries stored under `key` before `stored_at` (Unix s)."""
        self._latest.pop(key, None)
        self._latest[key] = stored_at
        self.is_empty = False
        if len(self._latest) > self._max_keys:
            oldest = next(iter(self._latest))
            self._trusted_from = max(self._trusted_from, self._latest.pop(oldest))

    def discard(self, key: str) -> None:
        """Record that the tier holds the latest entry under `key` again."""
        self._latest.pop(key, None)
        self.is_empty = not self._latest and self._trusted_from == -inf

    def may_be_stale(self, key: str, stored_at: float) -> bool:
        """Return whether an entry that was stored at `stored_at` (Unix s) may be outdated."""
        return stored_at < self._latest.get(key, self._trusted_from)

    def __contains__(self, key: object) -> bool:
        return key in self._latest
