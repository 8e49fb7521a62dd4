"""Generation: has an engine generate the answer to a cached request."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import aiohttp
from aiohttp import hdrs

from server.config.base import CENTURY_S
from server.engine.models import ServedModels
from server.handlers.recording import record_answer
from server.handlers.upstream_headers import (
    FALLBACK,
    LOAD,
    LOAD_FORMAT,
    cacheable_request_headers,
    with_cache_control,
)
from server.protocol import convert
from server.protocol.cache_control import NO_CACHE, CacheControl, limit_freshness
from server.protocol.formats import Encoding
from server.protocol.request import ParsedRequest
from server.protocol.usage import counts_in
from server.telemetry.finished import EnginePrompts
from server.web.offload import offload
from server.web.request import HttpRequest
from tiers import Answer, Flight, Freshness
from tiers.prefix_kv.options import DISK_TOKENS

# Some twenty events, which take less than half a millisecond.
_PIECE_BYTES = 4096


class Engines(NamedTuple):
    """The engines that generate answers, and how long their answers are kept.

    Args:
        models: the models, whose upstreams generate.
        freshness: returns how long answers of a route and a model are fresh.
        obeys_upstreams: whether an upstream's `Cache-Control` counts.
        max_recorded_bytes: a longer stream is relayed, but not kept.
        prompts: notes the prompts that engines have answered.
    """

    models: ServedModels
    freshness: Callable[[str, str], Freshness]
    obeys_upstreams: bool
    max_recorded_bytes: int
    prompts: EnginePrompts


class EngineGeneration:
    """The generation of one request's answer; see `tiers.answer_cache.Generation`."""

    def __init__(
        self, engines: Engines, http: HttpRequest, request: ParsedRequest, control: CacheControl
    ) -> None:
        self._engines, self._request, self._acceptance = engines, request, control.acceptance
        # Not the whole of `http`, which would stay in memory for as long as the generation runs.
        self._headers = cacheable_request_headers(http)

    @property
    def encoding(self) -> int:
        return self._request.encoding

    @property
    def labels(self) -> tuple[str, ...]:
        return self._request.labels

    @property
    def variant(self) -> str:
        # Others share the answer, which may come from a cache on the way: as old as they accept.
        acceptance = self._acceptance
        return str(acceptance) if acceptance.no_cache or acceptance.limits_age else ""

    @property
    def can_refresh(self) -> bool:
        return self._engines.models.upstreams(self._request.model).ready

    async def generate(self, flight: Flight) -> Freshness | None:
        """Send the request to an engine, and publish its answer as it arrives.

        Raises:
            UnavailableError: no upstream takes the request.
            NotAnAnswerError: the engine's reply isn't an answer.
            aiohttp.ClientError, OSError: the engine fails.
        """
        request, engines = self._request, self._engines
        # A cache on the way, such as another tierserve, must not answer a refresh.
        control = NO_CACHE if flight.is_refresh else request.cache.control
        headers = with_cache_control(self._headers, control)
        upstreams = engines.models.upstreams(request.model)
        async with upstreams.request(
            "POST",
            request.path,
            data=request.body,
            headers=headers,
            repeatable=True,
            asked=request,
            # Nobody waits for an engine who can get a stale answer.
            demand="counted" if flight.has_stale else "held",
        ) as reply:
            flight.age_s = _age_s(reply.headers)
            if LOAD_FORMAT in headers and LOAD in reply.headers:
                flight.notes = {headers[LOAD_FORMAT]: reply.headers[LOAD]}
            if FALLBACK in reply.headers:
                flight.notes = {**flight.notes, FALLBACK: reply.headers[FALLBACK]}
            recorded = await record_answer(
                reply,
                upstreams.pieces(reply, _PIECE_BYTES),
                request.route.format,
                Encoding(flight.encoding),
                flight.publish,
                engines.max_recorded_bytes,
            )
            counts = counts_in(recorded.answer)
            upstreams.note_counts(reply, counts)
        answer = recorded.answer
        freshness = self._freshness(reply) if recorded.is_finished else None
        if recorded.disk_tokens:
            flight.notes = {**flight.notes, DISK_TOKENS: str(recorded.disk_tokens)}
        flight.end(answer, kept=freshness is not None)
        is_stopping = (
            freshness is not None
            and request.route.format.hides_aborts
            and not await upstreams.keeps_generating(reply, model=request.model, headers=headers)
        )
        engines.prompts.note(request, counts, bypassed=False)
        return None if is_stopping else freshness

    async def convert(self, answer: Answer) -> Answer | None:
        encoding = Encoding(self._request.encoding)
        try:
            return await offload(len(answer.content), convert.convert, answer, encoding)
        except convert.NotConvertibleError:
            return None

    def _freshness(self, reply: aiohttp.ClientResponse) -> Freshness | None:
        """Return how long the answer in a reply is fresh; `None` if it isn't to be kept."""
        request, engines = self._request, self._engines
        freshness = engines.freshness(request.route.path, request.model)
        if request.cache.ttl_s is not None:
            freshness = freshness._replace(ttl_s=request.cache.ttl_s)
        if FALLBACK in reply.headers:
            # The upstream is a tierserve, where another model has answered.
            return None
        if not engines.obeys_upstreams:
            return freshness
        control = ", ".join(reply.headers.getall(hdrs.CACHE_CONTROL, ()))
        return limit_freshness(control, freshness, is_stream=request.encoding == Encoding.SSE)


def _age_s(headers: Mapping[str, str]) -> float:
    """Return the `Age` of a reply, which a cache in front of the engine sets."""
    age = headers.get(hdrs.AGE, "")
    return min(float(age), CENTURY_S) if age.isascii() and age.isdecimal() else 0
