"""What there is to ask for: `/v1/models` and `/v1/models/NAME`, as OpenAI and vLLM show it.

Engines are asked what only they know. Their `root` may be a folder of theirs, and is left out.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from server.engine.models import Model, Models
from server.engine.upstream import UnavailableError
from server.handlers.upstream_headers import forwarded_headers
from server.web.request import HttpRequest
from server.web.responses import error_response

PATH = "/v1/models"
_ONE = f"{PATH}/"
# An engine that is busy may take long, and most clients want no more than the names.
_DEADLINE_S = 2
_MAX_BYTES = 1024 * 1024
_ENGINE_FIELDS = ("created", "max_model_len", "owned_by", "permission")
_REFUSED = (401, 403)

Cards = Mapping[str, Mapping[str, Any]]
"""What an engine says of each of its models, by name."""


def is_one_model(path: str) -> bool:
    """Whether a path names a model."""
    return path.startswith(_ONE) and path != _ONE


class ModelList:
    """The handler of both routes."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._started = int(time.time())

    async def all(self, http: HttpRequest) -> web.Response:
        """Answer with all models, their aliases and adapters, the first model first."""
        return await self._answer(http, None)

    async def one(self, http: HttpRequest) -> web.Response:
        """Answer with the one that the path names.

        Raises:
            UnknownModelError: there is none.
        """
        return await self._answer(http, http.path.removeprefix(_ONE))

    async def _answer(self, http: HttpRequest, wanted: str | None) -> web.Response:
        if wanted is None:
            models = self._models.all
        else:
            models = (self._models.get(self._models.names().resolve(wanted).name),)
        told = await asyncio.gather(*(_list_of_engine(http, model) for model in models))
        statuses = [status for status, _ in told if status is not None]
        if statuses and all(status in _REFUSED for status in statuses):
            return error_response(statuses[0], "The engine wants another API key.")
        listed = [
            card
            for model, (_, cards) in zip(models, told, strict=True)
            for card in self._cards(model, cards)
        ]
        if wanted is None:
            body: Any = {"object": "list", "data": listed}
        else:
            body = next(card for card in listed if card["id"] == wanted)
        return web.Response(body=orjson.dumps(body), content_type="application/json")

    def _cards(self, model: Model, cards: Cards) -> Iterator[dict[str, Any]]:
        for name, known_as in model.served_names():
            is_adapter = known_as != model.name
            card: dict[str, Any] = {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "vllm",
                "root": known_as if is_adapter else model.root,
                "parent": model.name if is_adapter else None,
                "max_model_len": None,
                "permission": [],
            }
            theirs = cards.get(known_as, {})
            yield card | {field: theirs[field] for field in _ENGINE_FIELDS if field in theirs}


async def _list_of_engine(http: HttpRequest, model: Model) -> tuple[int | None, Cards]:
    """Return what an engine of the model says of itself, and the status with which it does."""
    try:
        async with (
            asyncio.timeout(_DEADLINE_S),
            model.upstreams.request(
                "GET", PATH, data=None, headers=forwarded_headers(http)
            ) as reply,
        ):
            if reply.status != 200:
                return reply.status, {}
            said = orjson.loads(await _read_bounded(reply))
            return 200, {card["id"]: card for card in said["data"]}
    except (aiohttp.ClientError, OSError, UnavailableError):
        return None, {}
    except (ValueError, KeyError, TypeError):
        # Some servers list nothing that we know.
        return 200, {}


async def _read_bounded(reply: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > _MAX_BYTES:
            raise ValueError("no list of models is as long")
    return body
