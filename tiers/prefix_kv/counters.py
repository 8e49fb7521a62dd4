"""Counters of engines' prefix blocks, kept in the index over restarts, one set for each model.

Engines add to them in the background, and the server reads them, so they are there even while an
engine is down.
"""

from threading import Lock
from typing import Literal

Name = Literal[
    "lookups", "hits", "queried_tokens", "loaded_tokens", "load_seconds", "failed_loads",
    "warmed_tokens", "saved_seconds", "lost_seconds", "stored_blocks", "store_seconds",
    "dropped_blocks", "evicted_blocks", "damaged_blocks", "errors",
]  # fmt: skip

COUNTERS: dict[Name, str] = {
    "lookups": "Requests whose prefix was looked up on disk",
    "hits": "Requests of which a part was loaded from disk",
    "queried_tokens": "Tokens of prompts that the engine's own cache didn't hold",
    "loaded_tokens": "Tokens of prompts that were loaded from disk",
    "load_seconds": "Seconds from the begin of a load until the request could go on",
    "warmed_tokens": "Tokens of prefixes that were loaded into the engine's cache after a start",
    "failed_loads": "Loads that failed or took too long, so that their tokens were computed",
    "saved_seconds": "Seconds that computing what was loaded would have taken longer",
    "lost_seconds": "Seconds that computing what was loaded would have been faster",
    "stored_blocks": "Blocks stored",
    "store_seconds": "Seconds of copying blocks for the disk while the model waits",
    "dropped_blocks": "Blocks not stored because the disk was slower than the engine, or failed",
    "evicted_blocks": "Blocks evicted to make room",
    "damaged_blocks": "Blocks found damaged, and removed",
    "errors": "Failures of the connector, each of which cost computing",
}


class EngineCounts:
    """Counts since the last `take`; any thread may add."""

    def __init__(self) -> None:
        self._counts: dict[Name, float] = {}
        self._lock = Lock()

    def add(self, name: Name, number: float = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + number

    def take(self) -> dict[Name, float]:
        """Return the counts, and begin anew."""
        with self._lock:
            taken, self._counts = self._counts, {}
        return taken
