"""An engine that counts: each answer has its own number, and how often each prompt was generated.

An answer takes as long as the prompt's field `seed` says, in milliseconds. It is the engine's name,
a number that rises, and as many words as `max_tokens` says. `GET /counts` tells how
often each prompt was asked.

Usage: counting_engine.py NAME
"""

import asyncio
import sys
import time
from collections import Counter
from typing import Any

from aiohttp import web

PORT = 8000
_USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


class Engine:
    """Answers chat completions."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._times: Counter[str] = Counter()

    async def complete(self, http: web.Request) -> web.Response:
        """Answer a chat completion."""
        asked = await http.json()
        messages: list[dict[str, Any]] = asked["messages"]
        self._times[messages[-1]["content"]] += 1
        begun = time.monotonic_ns()
        await asyncio.sleep((asked.get("seed") or 0) / 1000)
        # All machines here have one monotonic clock.
        content = f"{self._name} {begun}" + " word" * asked["max_tokens"]
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return web.json_response(
            {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "large",
             "choices": [choice], "usage": _USAGE}
        )  # fmt: skip

    async def counts(self, _: web.Request) -> web.Response:
        """Return how often each prompt was asked, by its last message."""
        return web.json_response(self._times)


async def models(_: web.Request) -> web.Response:
    """List no model, which is enough to be ready."""
    return web.json_response({"object": "list", "data": []})


async def token(_: web.Request) -> web.Response:
    """Give one token, which shows that the engine generates."""
    return web.json_response({"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]})


def main() -> int:
    """Serve until killed."""
    engine, app = Engine(sys.argv[1]), web.Application()
    app.router.add_post("/v1/chat/completions", engine.complete)
    app.router.add_post("/v1/completions", token)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/counts", engine.counts)
    web.run_app(app, port=PORT, print=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
