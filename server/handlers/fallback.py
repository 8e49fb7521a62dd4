"""Fallbacks: the model that answers where the engine or all upstreams of another can't.

A fallback answers as if the client had asked for it: from what tiers hold of it or by its engine,
under its own key. So nothing of it is kept as an answer of the model that was asked for. Those who
wait for one generation of that model each fall back by themselves, so each is told.
"""

from collections.abc import Awaitable, Callable, Container
from typing import Any

from server.engine.models import ServedModels
from server.handlers.upstream_headers import fallback_headers
from server.protocol.bodies import read_object
from server.protocol.formats import OPAQUE
from server.protocol.request import ParsedRequest, key_headers, parse_request
from server.protocol.routes import CachedRoute
from server.web.offload import offload
from server.web.request import HttpRequest, Reply

# By these nobody has answered: ours, and those with which a request goes on to other upstreams.
_UNANSWERED = frozenset({429, 502, 503, 504})
# Ours, where nothing was sent to an engine.
_UNSENT = frozenset({503})
_ERRORS = range(400, 600)
# Numbers of tokens, which mean other text to another model.
_TOKEN_FIELDS = ("allowed_token_ids", "logit_bias", "prompt_embeds", "stop_token_ids")

AnswerOf = Callable[[ParsedRequest, Container[int]], Awaitable[Reply]]
"""Answers a request; error replies of these statuses are given back, but not sent yet."""


class Fallbacks:
    """The fallbacks of all models.

    Args:
        models: the models.
        engine_keeps: whether vLLM itself keeps Responses, under ids that it gives.
    """

    def __init__(self, models: ServedModels, *, engine_keeps: bool) -> None:
        self._models, self._engine_keeps = models, engine_keeps

    def held_back(self, request: ParsedRequest) -> Container[int]:
        """Return the statuses of replies that aren't sent yet, since a fallback may answer."""
        # What may have had an effect isn't sent to a second engine.
        return _UNANSWERED if not request.has_effect and self._may_fall_back(request) else ()

    async def answer_instead(
        self, http: HttpRequest, raw: bytes, request: ParsedRequest, failed: Reply, answer: AnswerOf
    ) -> Reply:
        """Return the answer of the first fallback that has one, or else `failed`.

        Args:
            http: the request.
            raw: its body as received.
            request: what it means.
            failed: the reply of the model that it asks for.
            answer: answers it by another model.
        """
        if not (_is_unanswered(failed, request) and self._may_fall_back(request)):
            return failed
        if await offload(len(raw), _is_bound, request.route, raw):
            return failed
        names, headers, ours = self._models.names(), key_headers(http.headers), http.more_headers
        name = self._models.fallback_of(request.model)
        while name is not None:
            other = await offload(
                len(raw), parse_request, http.path, raw, http.tenant, names, headers, name
            )
            if self._would_be_kept(other):
                break
            http.more_headers = {**ours, **fallback_headers(other.model)}
            reply = response, served = await answer(other, () if other.has_effect else _ERRORS)
            if response.prepared or served.outcome != "error":
                return response, served._replace(asked=request.model)
            if not _is_unanswered(reply, other):
                break
            name = self._models.fallback_of(other.model)
        http.more_headers = ours
        return failed

    def _may_fall_back(self, request: ParsedRequest) -> bool:
        return (
            self._models.fallback_of(request.model) is not None
            # Vectors, scores and tokens of another model mean something else.
            and request.route.format is not OPAQUE
            and request.cache.fallback is not False
            and not self._would_be_kept(request)
        )

    def _would_be_kept(self, request: ParsedRequest) -> bool:
        """Whether the engine may keep the answer: later it would be looked for at another one."""
        return request.engine_would_keep and (self._engine_keeps or not request.is_vllm)


def _is_unanswered(failed: Reply, request: ParsedRequest) -> bool:
    """Whether another model may be asked after this error."""
    response, _ = failed
    statuses = _UNSENT if request.has_effect else _UNANSWERED
    return not response.prepared and response.status in statuses


def _is_bound(route: CachedRoute, raw: bytes) -> bool:
    """Whether a body refers to tokens of its model, or to what the model's engine holds."""
    body: dict[str, Any] = read_object(raw)[1]
    prompt = body.get("prompt")
    is_text = not isinstance(prompt, list) or all(isinstance(each, str) for each in prompt)
    return not is_text or any(body.get(name) for name in _TOKEN_FIELDS + route.fields.unrepeatable)
