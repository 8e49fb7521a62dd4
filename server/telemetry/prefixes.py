"""The prefixes that prompts share most, which engines' prefix caches can reuse.

A prefix ends at the end of one of a prompt's first parts (the tools, the system prompt, a message),
or within long ones (`server.telemetry.prompt_text`). Of a body only the first 32 KiB are parsed,
and of several prompts only the first counts, so that the largest request takes a millisecond or
two. Only requests that an engine has answered are counted, so a hit costs nothing.

Prompts of different tenants, models or cache salts have different prefixes, as they have in vLLM.
All counts are halved every day, at midnight UTC. Prefixes are known by digests, and days are those
of the clock, so that the counts of several processes can be merged.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import attrgetter
from typing import Any, NamedTuple

from server.protocol.request import ParsedRequest
from server.protocol.usage import input_tokens_in, reused_tokens_in
from server.telemetry.heavy_hitters import Counter, HeavyHitters
from server.telemetry.prompt_text import TOOLS, prompt_fields, prompt_parts, prompt_pieces
from tiers.key import digest

_COUNTERS = 1000
_MAX_REPORTED = 100
_DAY_S = 86400
_PARSED_BYTES = 32 * 1024
_NUMBER_BYTES = 8
_HEAD, _TAIL = 100, 60
"""Characters of a preview."""


class _Prefix(NamedTuple):
    number: int
    characters: int
    preview: str


@dataclass(slots=True)
class _PrefixStats:
    """The statistics of a prefix."""

    model: str
    tenant: str
    shorter: int | None
    """The number of the next shorter prefix of the same prompts."""
    characters: int
    preview: str
    asked_at: float = 0
    tokens: float | None = None
    """An estimate by the last prompt that had this prefix."""
    counted_tokens: float = 0
    """Its tokens in all requests whose answers had a count of reused tokens."""
    reused_tokens: float = 0


_fields = attrgetter(*_PrefixStats.__slots__)


class Prefixes:
    """The most frequent prefixes, in 1,000 counters of less than a kilobyte each.

    Args:
        clock: returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counters: HeavyHitters[_PrefixStats] = HeavyHitters(_COUNTERS)
        self._day = self._today()

    def note(self, request: ParsedRequest, counts: bytes) -> None:
        """Count the prefixes of a request that an engine has answered with generated text.

        `counts` is the end of its answer, which may have the token counts.
        """
        if not request.route.streams:
            return
        self._halve_if_due()
        try:
            fields = prompt_fields(request, _PARSED_BYTES)
        except ValueError:
            # It is nested too deeply.
            return
        model, tenant = request.model, request.tenant
        seed = digest(*map(_encode, (model, tenant, str(fields.get("cache_salt"))))).encode()
        is_whole = len(request.raw) <= _PARSED_BYTES
        parts = list(prompt_parts(fields))
        prefixes = list(_prefixes_of(seed, parts, is_whole=is_whole))
        if not prefixes:
            return
        tokens_per_character = 0.0
        reused = None
        if request.prompts.number <= 1 and (tokens := input_tokens_in(counts)) is not None:
            reused = reused_tokens_in(counts)
            whole = sum(map(len, parts)) if is_whole else len(request.raw)
            tokens_per_character = tokens / max(whole, 1)
        now, shorter = self._clock(), None
        for number, characters, preview in prefixes:
            new = _PrefixStats(model, tenant, shorter, characters, preview)
            stats = self._counters.add(number, new)
            stats.asked_at, shorter = now, number
            if tokens_per_character:
                stats.tokens = tokens_per_character * characters
                if reused is not None:
                    stats.counted_tokens += stats.tokens
                    stats.reused_tokens += min(reused, stats.tokens)

    def report(self) -> dict[str, Any]:
        """Return the prefixes that came more than once, the most frequent first.

        A prefix is left out if a longer one came as often. `requests` is a lower bound of their
        number. `tokens` is an estimate of the prefix's tokens. `reused_tokens` is how many of them
        the engine took from its prefix cache, in all these requests. These two and `reused_ratio`
        are null where the engine doesn't report the counts.
        """
        self._halve_if_due()
        counters = self._counters.counters
        longer: dict[int, float] = {}
        for counter in counters.values():
            if (shorter := counter.value.shorter) is not None:
                longer[shorter] = max(counter.least, longer.get(shorter, 0))
        shared = [
            counter
            for number, counter in counters.items()
            if counter.least >= 2 and counter.least > longer.get(number, 0)
        ]
        shared.sort(key=lambda counter: (-counter.least, -counter.value.characters))
        return {"prefixes": [_row(each.least, each.value) for each in shared[:_MAX_REPORTED]]}

    def summary(self) -> dict[str, Any]:
        """Return all counts, as `merge` takes them from JSON; half a megabyte at most."""
        self._halve_if_due()
        counters = self._counters.counters
        rows = [(n, each.count, each.excess, _fields(each.value)) for n, each in counters.items()]
        return {"day": self._day, "counters": rows}

    def merge(self, summary: Mapping[str, Any]) -> None:
        """Add the counts of another process, as it has summarized them."""
        self._halve_if_due()
        other = Prefixes(self._clock)
        other._day = summary["day"]
        counters = {
            number: Counter(count, excess, _PrefixStats(*fields))
            for number, count, excess, fields in summary["counters"]
        }
        other._counters.merge(counters, _merged)
        other._halve_if_due()
        self._counters.merge(other._counters.counters, _merged)

    def _today(self) -> int:
        return int(self._clock() // _DAY_S)

    def _halve_if_due(self) -> None:
        if (days := self._today() - self._day) <= 0:
            return
        self._day += days
        # After 60 halvings nothing is left of a count.
        factor = 0.5 ** min(days, 60)
        self._counters.scale(factor)
        for counter in self._counters.counters.values():
            counter.value.counted_tokens *= factor
            counter.value.reused_tokens *= factor


def _merged(one: _PrefixStats, other: _PrefixStats) -> _PrefixStats:
    latest = max(one, other, key=lambda stats: stats.asked_at)
    tokens = latest.tokens if latest.tokens is not None else one.tokens or other.tokens
    return replace(
        latest,
        tokens=tokens,
        counted_tokens=one.counted_tokens + other.counted_tokens,
        reused_tokens=one.reused_tokens + other.reused_tokens,
    )


def _row(requests: float, stats: _PrefixStats) -> dict[str, Any]:
    reused = reused_ratio = None
    if stats.counted_tokens > 0:
        reused = round(stats.reused_tokens)
        reused_ratio = round(stats.reused_tokens / stats.counted_tokens, 4)
    return {
        "model": stats.model,
        "tenant": stats.tenant,
        "requests": round(requests),
        "characters": stats.characters,
        "tokens": None if stats.tokens is None else round(stats.tokens),
        "reused_tokens": reused,
        "reused_ratio": reused_ratio,
        "asked_at": stats.asked_at,
        "preview": stats.preview,
    }


def _prefixes_of(seed: bytes, parts: Sequence[str], *, is_whole: bool) -> Iterator[_Prefix]:
    """Yield the prefixes of a prompt, shortest first; the last part may be cut off."""
    chain, head, tail, tools = seed, "", "", 0
    for index, piece, end in prompt_pieces(parts, is_whole=is_whole):
        if index and not tools and parts[0].startswith(TOOLS):
            # The preview leaves the tools out: they look alike in all prompts.
            tools, head = len(parts[0]), ""
        # Each follows from the one before it, so a long text is digested once.
        chain = blake2b(chain + _encode(piece), digest_size=_NUMBER_BYTES).digest()
        head, tail = (head + piece)[:_HEAD], (tail + piece)[-_TAIL:]
        yield _Prefix(int.from_bytes(chain), end, _preview(head, tail, end - tools))


def _encode(text: str) -> bytes:
    # A text may hold lone surrogates.
    return text.encode(errors="surrogatepass")


def _preview(head: str, tail: str, characters: int) -> str:
    if characters <= len(head):
        return head
    return f"{head}…{tail[-(characters - len(head)) :]}"
