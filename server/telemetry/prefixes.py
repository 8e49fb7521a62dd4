"""The prefixes that prompts share most, which engines' prefix caches can reuse.

A prefix ends at the end of one of a prompt's first parts (the tools, the system prompt, a message),
or within them after 1,024, 4,096 and 16,384 characters, since long texts may differ only later. Of
a body only the first 32 KiB are parsed, and of several prompts only the first counts, so that the
largest request takes a millisecond or two. Only requests that an engine has answered are counted,
so a hit costs nothing.

Fields that the engine drops aren't part of its prompts (`server.protocol.vllm_fields`).

Prompts of different tenants, models or cache salts have different prefixes, as they have in vLLM.
All counts are halved every day.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

from server.protocol.request import ParsedRequest
from server.protocol.usage import input_tokens_in, reused_tokens_in
from server.telemetry.heavy_hitters import HeavyHitters

_COUNTERS = 1000
_MAX_REPORTED = 100
_HALVED_EVERY_S = 86400
_PARSED_BYTES = 32 * 1024
_PARTS = 10
_CUTS = (1024, 4096, 16384)
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


class Prefixes:
    """The most frequent prefixes, in 1,000 counters of less than a kilobyte each.

    Args:
        clock: returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counters: HeavyHitters[_PrefixStats] = HeavyHitters(_COUNTERS)
        self._halve_at = clock() + _HALVED_EVERY_S

    def note(self, request: ParsedRequest, counts: bytes) -> None:
        """Count the prefixes of a request that an engine has answered with generated text.

        `counts` is the end of its answer, which may have the token counts.
        """
        if not request.route.streams:
            return
        self._halve_if_due()
        try:
            fields = _parse_start(request.raw)
        except ValueError:
            # It is nested too deeply.
            return
        if request.is_vllm:
            fields = request.route.fields.normalize(fields)
        model, tenant = request.model, request.tenant
        seed = hash((model, tenant, str(fields.get("cache_salt"))))
        is_whole = len(request.raw) <= _PARSED_BYTES
        parts = list(_parts(fields))
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

    def _halve_if_due(self) -> None:
        now = self._clock()
        if now < self._halve_at:
            return
        days = 1 + int((now - self._halve_at) // _HALVED_EVERY_S)
        self._halve_at += days * _HALVED_EVERY_S
        # After 60 halvings nothing is left of a count.
        factor = 0.5 ** min(days, 60)
        self._counters.scale(factor)
        for counter in self._counters.counters.values():
            counter.value.counted_tokens *= factor
            counter.value.reused_tokens *= factor


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


def _parse_start(body: bytes) -> dict[str, Any]:
    """Return the fields of a body's start, and its tools.

    Raises:
        ValueError: it is nested too deeply.
    """
    fields: dict[str, Any] = from_json(
        body[:_PARSED_BYTES], allow_partial="trailing-strings", cache_strings="none"
    )
    if len(body) > _PARSED_BYTES and "tools" not in fields:
        # Clients write the tools after the messages. A quote within a text has a backslash before
        # it, so this is a field's name. If it is no field of the body, the rest isn't valid JSON.
        at = body.rfind(b'"tools":', len(body) - _PARSED_BYTES)
        if at >= 0:
            with suppress(ValueError):
                fields["tools"] = from_json(b"{" + body[at:])["tools"]
    return fields


def _prefixes_of(seed: int, parts: Sequence[str], *, is_whole: bool) -> Iterator[_Prefix]:
    """Yield the prefixes of a prompt, shortest first; the last part may be cut off."""
    number, at, head, tail, tools = seed, 0, "", "", 0
    for index, part in enumerate(parts[:_PARTS]):
        done = 0
        ends = [cut - at for cut in _CUTS if at < cut < at + len(part)]
        if is_whole or index < len(parts) - 1:
            ends.append(len(part))
        for end in ends:
            piece, done = part[done:end], end
            # Python seeds `hash` at random, so nobody can find prefixes that share a number.
            number = hash((number, piece))
            head, tail = (head + piece)[:_HEAD], (tail + piece)[-_TAIL:]
            yield _Prefix(number, at + end, _preview(head, tail, at + end - tools))
        at += len(part)
        if index == 0 and part.startswith(_TOOLS):
            # The preview leaves the tools out: they look alike in all prompts.
            tools, head = at, ""


_TOOLS = "tools: "


def _preview(head: str, tail: str, characters: int) -> str:
    if characters <= len(head):
        return head
    return f"{head}…{tail[-(characters - len(head)) :]}"


def _parts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of a prompt as texts."""
    for name in ("tools", "system", "instructions"):
        if value := fields.get(name):
            yield f"{name}: {_text(value)}\n"
    prompt = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if not isinstance(prompt, list):
        if isinstance(prompt, str):
            yield prompt
        return
    if prompt and isinstance(prompt[0], list | str):
        yield _text(prompt[0])
    elif prompt and isinstance(prompt[0], int):
        yield _text(prompt)
    else:
        yield from map(_message, prompt)


def _message(item: Any) -> str:
    if not isinstance(item, dict):
        return _text(item)
    role = item.get("role")
    rest = {name: value for name, value in item.items() if name != "role"}
    content = rest["content"] if rest.keys() == {"content"} else rest
    return f"{role}: {_text(content)}\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value).decode()
