"""Which beginnings of prompts engines are asked for most: what their prefix caches can reuse.

A beginning ends where one of the first parts of a prompt does (the tools, the system prompt, a
message), or within them after 1,024, 4,096 and 16,384 characters, since a long text may begin alike
and go on otherwise. Of a body only the first 32 KiB are looked at, and of several prompts the first
one, so that the largest request takes a millisecond or two. Only what an engine has answered
is counted: what a tier answers pays nothing.

What an engine drops isn't part of its prompts (`server.protocol.vllm_fields`).

Prompts of different tenants, models or cache salts are different beginnings, as they are to vLLM.
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
_TOLD = 100
_HALVED_EVERY_S = 86400
_LOOKED_AT_BYTES = 32 * 1024
_PARTS = 10
_CUTS = (1024, 4096, 16384)
_HEAD, _TAIL = 100, 60
"""Characters of a preview."""


class _Beginning(NamedTuple):
    number: int
    characters: int
    preview: str


@dataclass(slots=True)
class _Known:
    """What is known of a beginning that is counted."""

    model: str
    tenant: str
    shorter: int | None
    """The number of the next shorter beginning of the same prompts."""
    characters: int
    preview: str
    asked_at: float = 0
    tokens: float | None = None
    """About so many, by the last prompt that it was of."""
    told: float = 0
    """Its tokens in all requests of which engines told what they reused."""
    reused: float = 0


class Prefixes:
    """The beginnings that are asked for most, in 1,000 counters of less than a kilobyte each.

    Args:
        clock: returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counters: HeavyHitters[_Known] = HeavyHitters(_COUNTERS)
        self._halve_at = clock() + _HALVED_EVERY_S

    def note(self, request: ParsedRequest, counts: bytes) -> None:
        """Count a request that an engine has answered, unless it generates nothing.

        `counts` is the end of its answer, which may tell token counts.
        """
        if not request.route.streams:
            return
        self._age()
        try:
            fields = _looked_at(request.raw)
        except ValueError:
            # Nested more deeply than we look.
            return
        if request.is_vllm:
            fields = request.route.fields.normalize(fields)
        model, tenant = request.model, request.tenant
        seed = hash((model, tenant, str(fields.get("cache_salt"))))
        is_whole = len(request.raw) <= _LOOKED_AT_BYTES
        parts = list(_parts(fields))
        found = list(_beginnings(seed, parts, is_whole=is_whole))
        if not found:
            return
        of_a_character = 0.0
        reused = None
        if request.prompts.number <= 1 and (tokens := input_tokens_in(counts)) is not None:
            reused = reused_tokens_in(counts)
            whole = sum(map(len, parts)) if is_whole else len(request.raw)
            of_a_character = tokens / max(whole, 1)
        now, shorter = self._clock(), None
        for number, characters, preview in found:
            new = _Known(model, tenant, shorter, characters, preview)
            known = self._counters.add(number, new)
            known.asked_at, shorter = now, number
            if of_a_character:
                known.tokens = of_a_character * characters
                if reused is not None:
                    known.told += known.tokens
                    known.reused += min(reused, known.tokens)

    def report(self) -> dict[str, Any]:
        """Return the beginnings that were asked for more than once, those asked for most first.

        One isn't told where a longer one was asked for as often, since that says more. `requests`
        is how many there were at least; `tokens` is about how many it has, and `reused_tokens` how
        many of them the engine says it didn't have to compute, in all these requests. They, and
        `reused_ratio`, are null where it doesn't tell.
        """
        self._age()
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
        return {"prefixes": [_row(each.least, each.value) for each in shared[:_TOLD]]}

    def _age(self) -> None:
        now = self._clock()
        if now < self._halve_at:
            return
        days = 1 + int((now - self._halve_at) // _HALVED_EVERY_S)
        self._halve_at += days * _HALVED_EVERY_S
        # Beyond, the first is as good as forgotten.
        factor = 0.5 ** min(days, 60)
        self._counters.scale(factor)
        for counter in self._counters.counters.values():
            counter.value.told *= factor
            counter.value.reused *= factor


def _row(requests: float, known: _Known) -> dict[str, Any]:
    is_told = known.told > 0
    return {
        "model": known.model,
        "tenant": known.tenant,
        "requests": round(requests),
        "characters": known.characters,
        "tokens": None if known.tokens is None else round(known.tokens),
        "reused_tokens": round(known.reused) if is_told else None,
        "reused_ratio": round(known.reused / known.told, 4) if is_told else None,
        "asked_at": known.asked_at,
        "preview": known.preview,
    }


def _looked_at(body: bytes) -> dict[str, Any]:
    """Return the fields of a body, as far as they are looked at.

    Raises:
        ValueError: it is nested too deeply.
    """
    fields: dict[str, Any] = from_json(
        body[:_LOOKED_AT_BYTES], allow_partial="trailing-strings", cache_strings="none"
    )
    if len(body) > _LOOKED_AT_BYTES and "tools" not in fields:
        # Clients write them after the messages. A quote within a text has a backslash before it, so
        # this is a field's name; where it isn't one of the body's, what follows isn't JSON.
        at = body.rfind(b'"tools":', len(body) - _LOOKED_AT_BYTES)
        if at >= 0:
            with suppress(ValueError):
                fields["tools"] = from_json(b"{" + body[at:])["tools"]
    return fields


def _beginnings(seed: int, parts: Sequence[str], *, is_whole: bool) -> Iterator[_Beginning]:
    """Yield the beginnings of a prompt, shortest first; what is cut off has no end of its own."""
    number, at, head, tail, tools = seed, 0, "", "", 0
    for index, part in enumerate(parts[:_PARTS]):
        done = 0
        ends = [cut - at for cut in _CUTS if at < cut < at + len(part)]
        if is_whole or index < len(parts) - 1:
            ends.append(len(part))
        for end in ends:
            piece, done = part[done:end], end
            # By chance anew in each process, so nobody can find two that share a number.
            number = hash((number, piece))
            head, tail = (head + piece)[:_HEAD], (tail + piece)[-_TAIL:]
            yield _Beginning(number, at + end, _preview(head, tail, at + end - tools))
        at += len(part)
        if index == 0 and part.startswith(_TOOLS):
            # They are alike, and tell less than what follows.
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
    said = rest["content"] if rest.keys() == {"content"} else rest
    return f"{role}: {_text(said)}\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value).decode()
