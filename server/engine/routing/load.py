"""What each upstream has to do: its requests under way, by tokens that it has to compute.

The tokens of a prompt are estimated from its length, and those that the upstream finds in its cache
from what came before. Both estimates follow what answers say.
"""

from dataclasses import dataclass

from server.auth.limits import Limits, LimitUsage

# Of English text.
_TOKENS_PER_BYTE = 0.25
# A request costs more than its prompt: it generates.
_REQUEST_TOKENS = 256
# Images stand in a body as far more bytes than an engine makes tokens of.
_MOST_TOKENS = 128 * 1024
# By how much one answer moves an estimate.
_STEP = 0.05


@dataclass(slots=True)
class UpstreamCounts:
    """What this process has sent to an upstream, for metrics."""

    requests: int = 0
    prompt_tokens: int = 0
    """Of the answers that tell them."""
    cached_tokens: int = 0
    """Those of them that the upstream found in its cache."""
    overflow: int = 0
    """Requests that came because one with their beginning had too much to do."""


class Estimate:
    """How many tokens a model's prompts have, and how many of them engines find in their caches."""

    def __init__(self) -> None:
        self._tokens_per_byte, self._found = _TOKENS_PER_BYTE, 1.0
        self.mean = float(_REQUEST_TOKENS)
        """The tokens of an average request."""

    def tokens_in(self, size: float) -> float:
        """Return the tokens of so many bytes of a body."""
        return min(self._tokens_per_byte * size, _MOST_TOKENS)

    def tokens(self, size: int, known: int) -> float:
        """Return the tokens that an upstream computes for a request.

        Args:
            size: bytes of its body.
            known: of these, at its beginning, those that the upstream has seen before.
        """
        tokens = self.tokens_in(max(size - self._found * known, 0)) + _REQUEST_TOKENS
        self.mean += _STEP * (tokens - self.mean)
        return tokens

    def learn(self, size: int, known: int, prompt_tokens: int, cached_tokens: int | None) -> None:
        """Correct the estimates by what an answer says of a request."""
        if size and prompt_tokens:
            self._tokens_per_byte += _STEP * (prompt_tokens / size - self._tokens_per_byte)
        if known and cached_tokens is not None:
            found = cached_tokens / max(self._tokens_per_byte * known, 1)
            self._found += _STEP * (min(found, 1.0) - self._found)


class UpstreamLoad:
    """The requests under way at one upstream.

    Args:
        usage: counts them in all processes that share it.
        limits: how many there may be.
        estimate: of the model.
    """

    def __init__(self, usage: LimitUsage, limits: Limits, estimate: Estimate) -> None:
        self._usage, self.limits, self._estimate = usage, limits, estimate
        self._tokens = 0.0
        self.active = 0
        """The number of requests under way that this process has sent."""
        self.foreign = 0
        """The number of requests there that nobody counts here: those of other servers."""
        self.counts = UpstreamCounts()

    @property
    def in_flight(self) -> int:
        """The number of requests under way, of all processes."""
        return self._usage.active

    @property
    def tokens(self) -> float:
        """The tokens under way; requests of others are taken for average ones."""
        others = max(self._usage.active - self.active, 0) + self.foreign
        return self._tokens + others * self._estimate.mean

    def note_requests(self, requests: int | None) -> None:
        """Note how many requests the upstream says it has; `None` if it doesn't."""
        self.foreign = max((requests or 0) - self.in_flight, 0)

    def begin(self, tokens: float) -> bool:
        """Count a request, which `end` must follow; return false if there are as many as may be."""
        if self._usage.begin(self.limits, 0.0) is not None:
            return False
        self.active += 1
        self._tokens += tokens
        self.counts.requests += 1
        return True

    def end(self, tokens: float) -> None:
        """Count the end of a request."""
        self._usage.end()
        self.active -= 1
        # Sums of floats go wrong a little; without requests nothing is left.
        self._tokens = self._tokens - tokens if self.active else 0.0

    def close(self) -> None:
        """Stop counting, when none is under way."""
        self._usage.close()
