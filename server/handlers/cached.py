"""The handler of requests that may be cached: parse, get or generate the answer, render it."""

import logging
from collections.abc import Container
from functools import partial
from math import floor
from typing import Literal, NamedTuple

import aiohttp
from aiohttp import hdrs

from server.engine.upstream import UnavailableError
from server.handlers.fallback import Fallbacks
from server.handlers.forwarding import Forwarding, forward
from server.handlers.generation import EngineGeneration, Engines
from server.handlers.hits import Hits
from server.handlers.recording import NotAnAnswerError
from server.handlers.rendering import (
    cache_status_of,
    failed_generation,
    generated,
    not_cached,
    relay_stream,
    relay_whole,
    render,
)
from server.handlers.upstream_headers import forwarded_headers, with_cache_control
from server.handlers.variants import Variants
from server.protocol import convert
from server.protocol.cache_control import CacheControl, parse_cache_control
from server.protocol.errors import BadRequestError
from server.protocol.formats import Encoding
from server.protocol.request import ParsedRequest, key_headers, parse_request
from server.telemetry.served import OWN, Served, attach
from server.telemetry.spans import step
from server.web.offload import offload
from server.web.request import HttpRequest, Reply
from tiers import Hit, State
from tiers.answer_cache import AnswerCache, Pending
from tiers.prefix_kv.options import DISK_TOKENS

logger = logging.getLogger(__name__)

_DEFAULT = CacheControl()
_JSON = "application/json"
_ENGINE = "engine"
_FRESH = State.FRESH


class CachingPolicy(NamedTuple):
    """Which requests are cached.

    Args:
        nondeterministic: whether nondeterministic requests are cached too: `never`, `always`, or
            `per_request`, where their field `cache` asks for it.
        variants: how many answers such a request gets in turn, by default.
        engine_keeps: whether the engine itself keeps Responses, under ids that it gives.
        max_prompts: how many prompts one request may have.
    """

    nondeterministic: Literal["never", "per_request", "always"]
    variants: int
    engine_keeps: bool
    max_prompts: int


class CachedRoutes:
    """The handler of the routes whose answers are cached.

    Args:
        answers: serves them, or has them generated.
        engines: generate them.
        policy: decides which requests are cached.
        variants: says which of several answers is next.
        hits: answers those whose bodies are known; `None` where each step is traced.
    """

    def __init__(
        self,
        answers: AnswerCache,
        engines: Engines,
        policy: CachingPolicy,
        variants: Variants,
        hits: Hits | None,
    ) -> None:
        self._answers, self._engines, self._policy = answers, engines, policy
        self._variants, self._hits = variants, hits
        self._fallbacks = Fallbacks(engines.models, engine_keeps=policy.engine_keeps)

    def use(self, engines: Engines, policy: CachingPolicy) -> None:
        """Answer by these from now on. What bodies mean is to be learned again: see `Hits`."""
        self._engines, self._policy = engines, policy

    async def answer(self, http: HttpRequest) -> Reply:
        """Answer from a tier, from a generation under way, or from the engine.

        Raises:
            BadRequestError: the request is wrong, or has too many prompts.
        """
        raw = await http.read_body()
        if self._hits is not None and (reply := self._hits.answer(http, raw)) is not None:
            return reply
        names = self._engines.models.names()
        with step("parse"):
            headers = key_headers(http.headers)
            request = await offload(
                len(raw), parse_request, http.path, raw, http.tenant, names, headers
            )
        if request.id is not None:
            http.take_id_from_body(request.id)
        try:
            control = self._check(http, request)
            reply = await self._answer(http, control, request)
            if reply[1].outcome == "error":
                answer = partial(self._answer, http, control)
                return await self._fallbacks.answer_instead(http, raw, request, reply, answer)
            if self._hits is not None and self._is_plain_hit(request, control, reply[1]):
                self._hits.learn(http, raw, names, request)
            return reply
        except BaseException as exc:
            attach(exc, OWN._replace(model=request.model))
            raise

    async def _answer(
        self,
        http: HttpRequest,
        control: CacheControl,
        request: ParsedRequest,
        held_back: Container[int] | None = None,
    ) -> Reply:
        """Answer by the request's model; errors of some statuses are returned, but not sent yet.

        By default they are those with which its fallback may answer.
        """
        if not control.no_store and self._is_cacheable(http, request):
            try:
                return await self._get_or_generate(http, request, control)
            except convert.NotConvertibleError as exc:
                logger.warning("an answer can't be given in the encoding asked for: %s", exc)
        if held_back is None:
            held_back = self._fallbacks.held_back(request)
        return await self._forward(http, request, control, held_back)

    def _is_plain_hit(self, request: ParsedRequest, control: CacheControl, served: Served) -> bool:
        """Whether a lookup alone has answered a request, and could again."""
        return (
            served.outcome == "hit"
            and served.answer is not None
            and served.answer.encoding == request.encoding
            and control == _DEFAULT
            and request.id is None
            and self._variants_of(request) == 1
        )

    def _check(self, http: HttpRequest, request: ParsedRequest) -> CacheControl:
        """Return what a request says about caching.

        Raises:
            BadRequestError: the request has too many prompts, or asks for variants in vain.
        """
        # Nearly always there are few, and `check` would be a call more for each hit.
        if request.prompts.number > self._policy.max_prompts:
            request.prompts.check(self._policy.max_prompts)
        if request.cache.variants is not None and not self._takes_variants(request):
            text = "cache.variants is for nondeterministic answers; cache.mode should be use"
            raise BadRequestError(text, "cache.variants")
        control = _DEFAULT
        if hdrs.CACHE_CONTROL in http.headers:
            control = parse_cache_control(", ".join(http.headers.getall(hdrs.CACHE_CONTROL)))
        if request.cache.control != _DEFAULT:
            control = control.merge(request.cache.control)
        return control

    async def _get_or_generate(
        self, http: HttpRequest, request: ParsedRequest, control: CacheControl
    ) -> Reply:
        if (variants := self._variants_of(request)) > 1:
            request = request._replace(key=self._variants.next(request.key, variants))
        begin = partial(EngineGeneration, self._engines, http, request, control)
        found = await self._answers.get_or_generate(request.key, begin, control.acceptance)
        if isinstance(found, Hit):
            return await self._serve(http, request, found, "hit")
        if found is None:
            return not_cached(), OWN._replace(model=request.model)
        try:
            return await self._relay(http, request, found)
        except BaseException as exc:
            # What a client hasn't got isn't counted as served.
            attach(exc, generated(request, found)._replace(key="", answer=None))
            raise

    def _variants_of(self, request: ParsedRequest) -> int:
        return 1 if request.deterministic else request.cache.variants or self._policy.variants

    async def _serve(self, http: HttpRequest, request: ParsedRequest, hit: Hit, how: str) -> Reply:
        """Answer with a tier's entry."""
        entry = hit.entry
        # Another machine's clock may be a little ahead.
        now = max(self._answers.chain.clock(), entry.stored_at)
        ttl, age = floor(entry.expires_at - now), int(now - entry.stored_at)
        status = f"tierserve; {how}; ttl={ttl}; detail={hit.tier}"
        response = await render(http, request, entry.answer, status, age)
        outcome = "hit" if hit.state is _FRESH else "stale"
        return response, Served(
            hit.tier, outcome, request.model, request.key, entry.answer, entry.generation_s
        )

    async def _relay(self, http: HttpRequest, request: ParsedRequest, pending: Pending) -> Reply:
        """Pass on what is generated, or a stale answer if that fails before anything was sent."""
        flight = pending.subscriber.flight
        try:
            async with pending.subscriber:
                with step("flight") as span:
                    span.set_attributes(joined=pending.joined)
                    if request.encoding == flight.encoding == Encoding.SSE:
                        return await relay_stream(http, request, pending)
                    reply = await relay_whole(http, request, pending)
                    if (tokens := flight.notes.get(DISK_TOKENS)) is not None:
                        span.set_attributes(disk_tokens=int(tokens))
                    return reply
        except (NotAnAnswerError, UnavailableError, aiohttp.ClientError, OSError) as exc:
            if http.is_disconnected:
                # The client has gone; the generation hasn't failed.
                raise ConnectionResetError from exc
            if _is_unknown_reply(exc) and flight.encoding != request.encoding:
                raise convert.NotConvertibleError("the reply has an unknown shape") from exc
            stale = pending.stale
            # It may have been purged while the engine was asked.
            if (
                stale is not None
                and _is_engine_failure(exc)
                and not self._answers.is_purged(request.key, stale)
            ):
                status = f"; fwd-status={exc.status}" if isinstance(exc, NotAnAnswerError) else ""
                return await self._serve(http, request, stale, f"fwd=stale{status}")
            failed = failed_generation(exc)
            failed.headers["Cache-Status"] = cache_status_of(pending)
            outcome = "error" if failed.status >= 400 else "pass"
            return failed, Served(_ENGINE, outcome, request.model)

    async def _forward(
        self,
        http: HttpRequest,
        request: ParsedRequest,
        control: CacheControl,
        held_back: Container[int],
    ) -> Reply:
        """Pass on a request whose answer isn't cached."""
        if control.acceptance.only_if_cached:
            return not_cached(), OWN._replace(model=request.model)
        note = partial(self._engines.prompts.note, request, bypassed=True)
        forwarding = Forwarding(
            model=request.model,
            body=request.raw,
            headers=with_cache_control(forwarded_headers(http), request.cache.control),
            cache_status="tierserve; fwd=bypass",
            repeatable=not request.has_effect,
            asked=request,
            kept_id=request.continues,
            # A client that sends `no-store` wants nothing of its request to be kept.
            on_end=None if control.no_store else note,
            held_back=held_back,
        )
        return await forward(http, self._engines.models.upstreams(request.model), forwarding)

    def _is_cacheable(self, http: HttpRequest, request: ParsedRequest) -> bool:
        # Only the engine knows the meaning of other content types and of a query; vLLM reads no
        # query on these routes.
        return (
            request.repeatable
            and (request.deterministic or self._caches_nondeterministic(request))
            and not (request.engine_would_keep and self._policy.engine_keeps)
            and (request.is_vllm or "?" not in http.raw_path)
            and http.media_type == _JSON
        )

    def _caches_nondeterministic(self, request: ParsedRequest) -> bool:
        rule = self._policy.nondeterministic
        return rule == "always" or (rule == "per_request" and request.cache.use)

    def _takes_variants(self, request: ParsedRequest) -> bool:
        return request.cache.use or self._policy.nondeterministic == "always"


def _is_engine_failure(exc: Exception) -> bool:
    """Return whether the engine failed, and didn't just refuse (RFC 5861, section 4)."""
    return not isinstance(exc, NotAnAnswerError) or exc.status in (500, 502, 503, 504)


def _is_unknown_reply(exc: Exception) -> bool:
    """Return whether the engine's reply was no error, but of a shape that we don't know."""
    return isinstance(exc, NotAnAnswerError) and exc.status < 400
