"""The last day in steps of two minutes: how many answers each tier gave, and what that saved.

Bounded: a ring with one number for each step per tier, and two for the savings; 40 kB at most.
"""

from array import array
from typing import Any

STEP_S = 120
STEPS = 24 * 3600 // STEP_S


class History:
    """The answers to one tenant, or to all. Times are Unix seconds."""

    __slots__ = ("_answered", "_first", "_seconds", "_step", "_tokens", "saved_s", "saved_tokens")

    def __init__(self) -> None:
        self._answered: dict[str, array[float]] = {}
        self._tokens, self._seconds = _ring(), _ring()
        self._first = self._step = 0
        self.saved_tokens, self.saved_s = 0, 0.0

    def add(self, at: float, tier: str, tokens: int, seconds: float, answers: int = 1) -> None:
        """Count answers of a tier or of `engine` at the time `at`, and what they saved together."""
        if at >= (self._step + 1) * STEP_S:
            self._go_on(int(at // STEP_S))
        slot = self._step % STEPS
        answered = self._answered.get(tier)
        if answered is None:
            answered = self._answered[tier] = _ring()
        answered[slot] += answers
        if tokens or seconds:
            self._tokens[slot] += tokens
            self._seconds[slot] += seconds
            self.saved_tokens += tokens
            self.saved_s += seconds

    def report(self, at: float) -> dict[str, Any]:
        """Return the steps from the first answer of the last day to `at`, oldest first."""
        if at >= (self._step + 1) * STEP_S and self._first:
            self._go_on(int(at // STEP_S))
        kept = min(STEPS, self._step - self._first + 1) if self._first else 0
        slots = [step % STEPS for step in range(self._step - kept + 1, self._step + 1)]
        return {
            "step_s": STEP_S,
            # Nothing may have been answered yet.
            "ends_at": (max(self._step, int(at // STEP_S)) + 1) * STEP_S,
            "answered": {n: [int(r[slot]) for slot in slots] for n, r in self._answered.items()},
            "tokens_saved": [int(self._tokens[slot]) for slot in slots],
            "seconds_saved": [round(self._seconds[slot], 3) for slot in slots],
            "saved_since_start": {
                "tokens": self.saved_tokens,
                "seconds": round(self.saved_s, 3),
            },
        }

    def _go_on(self, step: int) -> None:
        """Begin a step; those between are empty."""
        self._first = self._first or step
        rings = (*self._answered.values(), self._tokens, self._seconds)
        for passed in range(max(self._step + 1, step - STEPS + 1), step + 1):
            for ring in rings:
                ring[passed % STEPS] = 0
        self._step = step


def _ring() -> "array[float]":
    return array("d", bytes(8 * STEPS))
