"""The writes that a tier has lost, so that what they were to replace isn't taken for the latest."""

from math import inf

_MAX_KEYS = 16 * 1024


class FailedWrites:
    """Keys under which a tier may hold something older than what was last written or removed.

    Invariant: at most `max_keys` are known. Where one has to be forgotten for another, nothing that
    was stored before is trusted any more, under whatever key.

    Args:
        max_keys: about 200 bytes each.
    """

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self.has_any = False
        """Whether there is one; every hit asks, and a call would cost it more."""
        self._max_keys = max_keys
        self._latest: dict[str, float] = {}
        self._trusted_from = -inf

    def add(self, key: str, stored_at: float) -> None:
        """Hide what was stored under `key` before `stored_at` (Unix s)."""
        self._latest.pop(key, None)
        self._latest[key] = stored_at
        self.has_any = True
        if len(self._latest) > self._max_keys:
            longest = next(iter(self._latest))
            self._trusted_from = max(self._trusted_from, self._latest.pop(longest))

    def discard(self, key: str) -> None:
        """Note that what the tier holds under `key` is the latest again."""
        self._latest.pop(key, None)
        self.has_any = bool(self._latest) or self._trusted_from > -inf

    def may_be_stale(self, key: str, stored_at: float) -> bool:
        """Return whether an entry that was stored at `stored_at` (Unix s) may be outdated."""
        return stored_at < self._latest.get(key, self._trusted_from)

    def __contains__(self, key: object) -> bool:
        return key in self._latest
