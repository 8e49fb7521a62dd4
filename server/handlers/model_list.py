"""The list of models: `/v1/models` and `/v1/models/NAME`, as OpenAI and vLLM give it.

Engines are asked for the fields that only they know. Their `root` may be a folder of theirs, and is
left out.
"""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from server.engine.models import ServedModel, ServedModels
from server.engine.upstream import UnavailableError
from server.handlers.upstream_headers import forwarded_headers
from server.web.request import HttpRequest
from server.web.responses import error_response

PATH = "/v1/models"
_ONE = f"{PATH}/"
# A busy engine may take long, and most clients need only the names.
_DEADLINE_S = 2
_MAX_BYTES = 1024 * 1024
_ENGINE_FIELDS = ("created", "max_model_len", "owned_by", "permission")
_REFUSED = (401, 403)

Cards = Mapping[str, Mapping[str, Any]]
"""An engine's own description of each of its models, by name."""


def is_one_model(path: str) -> bool:
    """Whether a path is that of one model."""
    return path.startswith(_ONE) and path != _ONE


class ModelList:
    """The handler of both routes.

    Args:
        models: all of them.
        started_at: when the server began (Unix s), as the time when models were made.
    """

    def __init__(self, models: ServedModels, started_at: float) -> None:
        self._models, self._started = models, int(started_at)

    async def all(self, http: HttpRequest) -> web.Response:
        """Answer with all models, aliases and adapters, in the order of the configuration."""
        return await self._answer(http, None)

    async def one(self, http: HttpRequest) -> web.Response:
        """Answer with the model that the path names.

        Raises:
            UnknownModelError: it does not exist.
        """
        return await self._answer(http, http.path.removeprefix(_ONE))

    async def _answer(self, http: HttpRequest, wanted: str | None) -> web.Response:
        if wanted is None:
            models = self._models.all
        else:
            models = (self._models.get(self._models.names().resolve(wanted).name),)
        lists = await asyncio.gather(*(_list_of_engine(http, model) for model in models))
        statuses = [status for status, _ in lists if status is not None]
        if statuses and all(status in _REFUSED for status in statuses):
            return error_response(statuses[0], "The engine wants another API key.")
        listed = [
            card
            for model, (_, cards) in zip(models, lists, strict=True)
            for card in self._cards(model, cards)
        ]
        if wanted is None:
            body: Any = {"object": "list", "data": listed}
        else:
            body = next(card for card in listed if card["id"] == wanted)
        return web.Response(body=orjson.dumps(body), content_type="application/json")

    def _cards(self, model: ServedModel, cards: Cards) -> Iterator[dict[str, Any]]:
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
            engine_card = cards.get(known_as, {})
            yield card | {
                field: engine_card[field] for field in _ENGINE_FIELDS if field in engine_card
            }


async def _list_of_engine(http: HttpRequest, model: ServedModel) -> tuple[int | None, Cards]:
    """Return the status and the list of an engine of the model; without status if it failed."""
    try:
        async with (
            asyncio.timeout(_DEADLINE_S),
            model.upstreams.request(
                "GET", PATH, data=None, headers=forwarded_headers(http)
            ) as reply,
        ):
            if reply.status != 200:
                return reply.status, {}
            listed = orjson.loads(await _read_bounded(reply))
            return 200, {card["id"]: card for card in listed["data"]}
    except (aiohttp.ClientError, OSError, UnavailableError):
        return None, {}
    except (ValueError, KeyError, TypeError):
        # The list of some servers has another shape.
        return 200, {}


async def _read_bounded(reply: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > _MAX_BYTES:
            raise ValueError("the list of models is too long")
    return body
