"""How many prompts one request has: a body may hold many, on whatever route.

An engine runs each of them as a request of its own, so a limit of requests is none without one of
prompts (`server.max_prompts`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from server.protocol.errors import BadRequestError

# Lists of texts or tokens; of a conversation, whose messages are objects, it is but one prompt.
_TEXTS = ("images", "input", "messages", "prompt", "prompt_embeds", "texts")
# Lists of what is scored or embedded, which may be objects, too.
_OBJECTS = ("data_1", "data_2", "documents", "inputs", "items", "queries", "text_1", "text_2")


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


def prompts_in(path: str, body: Mapping[str, Any]) -> Prompts:
    """Count the prompts of a parsed body for a route."""
    found = [Prompts(_listed(body.get(name), str | list), name) for name in _TEXTS]
    # The documents that go with a conversation are part of it.
    kinds = str | list if path.startswith("/v1/chat/") else str | list | dict
    found += [Prompts(_listed(body.get(name), kinds), name) for name in _OBJECTS]
    return max(found)


def _listed(value: Any, kinds: Any) -> int:
    """Return how many a list has whose first is of these kinds; the others are alike."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], kinds) else 0
