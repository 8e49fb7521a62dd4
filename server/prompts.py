"""How many prompts one request has: a body may hold many, on whatever route.

An engine runs each of them as a request of its own, so a limit of requests is none without one of
prompts (`server.max_prompts`).
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from server.cache_field import BadRequestError
from server.isolation import SALTED

PASSED = SALTED | {"/v1/completions/render"}
"""The routes whose bodies are looked at, if they pass through."""
# Lists of texts or tokens; of a conversation, whose messages are objects, it is but one prompt.
_TEXTS = ("images", "input", "messages", "prompt", "prompt_embeds", "texts")
# Lists of what is scored or embedded, which may be objects, too.
_OBJECTS = ("data_1", "data_2", "documents", "inputs", "items", "queries", "text_1", "text_2")
# Above, looking at a body would stop all others for too long.
_INLINE_BYTES = 64 * 1024


class Prompts(NamedTuple):
    """How many prompts a body has, and which field holds them."""

    number: int
    field: str

    def check(self, most: int) -> None:
        """Refuse more than `most`.

        Raises:
            BadRequestError: there are more.
        """
        if self.number > most:
            text = f"{self.field} should have at most {most} prompts, not {self.number}"
            raise BadRequestError(text, self.field)


def prompts_in(body: Mapping[str, Any]) -> Prompts:
    """Count the prompts of a parsed body."""
    found = [Prompts(_listed(body.get(name), str | list), name) for name in _TEXTS]
    # The documents that go with a conversation are part of it.
    kinds = str | list if "messages" in body else str | list | dict
    found += [Prompts(_listed(body.get(name), kinds), name) for name in _OBJECTS]
    return max(found)


async def prompts_in_raw(raw: bytes) -> Prompts:
    """Count those of a body that passes through, without keeping others waiting."""
    if len(raw) <= _INLINE_BYTES:
        return _prompts_in_raw(raw)
    return await asyncio.to_thread(_prompts_in_raw, raw)


def _prompts_in_raw(raw: bytes) -> Prompts:
    try:
        body = orjson.loads(raw)
    except ValueError:
        # Engines take NaN and the like.
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
    return prompts_in(body if isinstance(body, dict) else {})


def _listed(value: Any, kinds: Any) -> int:
    """Return how many a list has whose first is of these kinds; the others are alike."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], kinds) else 0
