"""The handler of requests that may be cached: parse, get or generate the answer, render it."""

import logging
from functools import partial
from math import floor
from typing import Literal, NamedTuple

import aiohttp
from aiohttp import hdrs, web

from server.engine.upstream import UnavailableError
from server.handlers.forwarding import Forwarding, forward
from server.handlers.generation import EngineGeneration, Engines
from server.handlers.recording import NotAnAnswerError
from server.handlers.rendering import (
    abort_stream,
    begin_stream,
    failed_generation,
    fresh_marks,
    not_cached,
    render,
)
from server.handlers.upstream_headers import (
    LOAD,
    LOAD_FORMAT,
    forwarded_headers,
    with_cache_control,
)
from server.handlers.variants import Variants
from server.protocol import convert, template
from server.protocol.cache_control import CacheControl, parse_cache_control
from server.protocol.errors import BadRequestError
from server.protocol.formats import Encoding
from server.protocol.request import ParsedRequest, RequestParser, key_headers
from server.telemetry.served import OWN, Served, attach
from server.telemetry.spans import step
from server.web.offload import offload
from server.web.request import HttpRequest, Reply
from tiers import Answer, Flight, Hit, State
from tiers.answer_cache import AnswerCache, Pending

logger = logging.getLogger(__name__)

_DEFAULT = CacheControl()
_JSON = "application/json"
_ENGINE = "engine"
# `NamedTuple`'s own way to make a tuple would be a call more for each hit.
_new = tuple.__new__
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
    """

    def __init__(self, answers: AnswerCache, engines: Engines, policy: CachingPolicy) -> None:
        self._answers, self._engines, self._policy = answers, engines, policy
        self._variants, self._parser = Variants(), RequestParser()

    async def answer(self, http: HttpRequest) -> Reply:
        """Answer from a tier, from a generation under way, or from the engine.

        Raises:
            BadRequestError: the request is wrong, or has too many prompts.
        """
        raw = await http.read_body()
        with step("parse"):
            names, headers = self._engines.models.names(), key_headers(http.headers)
            request = await offload(
                len(raw), self._parser.parse, http.path, raw, http.tenant, names, headers
            )
        if request.id is not None:
            http.take_id_from_body(request.id)
        try:
            control = self._check(http, request)
            if not control.no_store and self._is_cacheable(http, request):
                try:
                    return await self._get_or_generate(http, request, control)
                except convert.NotConvertibleError as exc:
                    logger.warning("an answer can't be given in the encoding asked for: %s", exc)
            return await self._forward(http, request, control)
        except BaseException as exc:
            attach(exc, OWN._replace(model=request.model))
            raise

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
        variants = 1 if request.deterministic else request.cache.variants or self._policy.variants
        if variants > 1:
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
            attach(exc, _generated(request, found)._replace(key="", answer=None))
            raise

    async def _serve(self, http: HttpRequest, request: ParsedRequest, hit: Hit, how: str) -> Reply:
        """Answer with a tier's entry."""
        entry = hit.entry
        # Another machine's clock may be a little ahead.
        now = max(self._answers.chain.clock(), entry.stored_at)
        ttl, age = floor(entry.expires_at - now), int(now - entry.stored_at)
        status = f"tierserve; {how}; ttl={ttl}; detail={hit.tier}"
        response = await render(http, request, entry.answer, status, age)
        outcome = "hit" if hit.state is _FRESH else "stale"
        served = (hit.tier, outcome, request.model, request.key, entry.answer, entry.generation_s)
        return response, _new(Served, served)

    async def _relay(self, http: HttpRequest, request: ParsedRequest, pending: Pending) -> Reply:
        """Pass on what is generated, or a stale answer if that fails before anything was sent."""
        flight = pending.subscriber.flight
        try:
            async with pending.subscriber:
                with step("flight") as span:
                    span.set_attributes(joined=pending.joined)
                    if request.encoding == flight.encoding == Encoding.SSE:
                        return await _relay_stream(http, request, pending)
                    return await _relay_whole(http, request, pending)
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
            failed.headers["Cache-Status"] = _cache_status(pending)
            outcome = "error" if failed.status >= 400 else "pass"
            return failed, Served(_ENGINE, outcome, request.model)

    async def _forward(
        self, http: HttpRequest, request: ParsedRequest, control: CacheControl
    ) -> Reply:
        """Pass on a request whose answer isn't cached."""
        if control.acceptance.only_if_cached:
            return not_cached(), OWN._replace(model=request.model)
        prefixes = self._engines.prefixes
        forwarding = Forwarding(
            model=request.model,
            body=request.raw,
            headers=with_cache_control(forwarded_headers(http), request.cache.control),
            cache_status="tierserve; fwd=bypass",
            # A request that isn't repeatable may start work or run tools at the engine.
            repeatable=request.repeatable,
            # A client that sends `no-store` wants nothing of its request to be kept.
            on_end=None if control.no_store else lambda end: prefixes.note(request, end),
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


async def _relay_whole(http: HttpRequest, request: ParsedRequest, pending: Pending) -> Reply:
    """Wait for the whole answer."""
    flight = pending.subscriber.flight
    async for _ in pending.subscriber:
        pass
    # A hit has no such header: the engine isn't involved, so its load isn't known.
    load = flight.notes.get(http.headers.get(LOAD_FORMAT, ""))
    response = await render(
        http,
        request,
        _answer_of(flight),
        _cache_status(pending),
        int(flight.age_s),
        {} if load is None else {LOAD: load},
    )
    return response, _generated(request, pending)


async def _relay_stream(http: HttpRequest, request: ParsedRequest, pending: Pending) -> Reply:
    """Pass events on as they are generated.

    The stream begins when the engine's does, which may be long before its first event. Where a
    stale answer could be given instead it begins with that event, since then it no longer can.
    """
    flight = pending.subscriber.flight
    id_, created = fresh_marks(http, request)
    response: web.StreamResponse | None = None
    try:
        async for event in pending.subscriber:
            if pending.stale is not None and not event:
                continue
            if response is None:
                response = await begin_stream(http, _cache_status(pending), int(flight.age_s))
            if event:
                item = template.render_item(event, id_, created, wants_usage=request.wants_usage)
                await http.write(response, item)
    except (NotAnAnswerError, aiohttp.ClientError, OSError) as exc:
        if response is None or http.is_disconnected:
            raise
        error = Served(_ENGINE, "error", request.model)
        try:
            return await abort_stream(response, failed_generation(exc), request), error
        except BaseException as gone:
            attach(gone, error)
            raise
    if response is None:
        response = await begin_stream(http, _cache_status(pending), int(flight.age_s))
    usage = _answer_of(flight).trailer if request.wants_usage else b""
    end = template.fill_marks(usage, id_, created) + request.route.format.done
    await http.write(response, end)
    await response.write_eof()
    return response, _generated(request, pending)


def _cache_status(pending: Pending) -> str:
    """Return the `Cache-Status` of a generated answer (RFC 9211)."""
    return f"tierserve; fwd={pending.reason}{'; collapsed' if pending.collapsed else ''}"


def _generated(request: ParsedRequest, pending: Pending) -> Served:
    """Return the record of a generated answer, even an incomplete one."""
    outcome = "collapsed" if pending.collapsed else "miss"
    flight = pending.subscriber.flight
    answer = flight.answer if flight.kept else None
    return Served(_ENGINE, outcome, request.model, request.key, answer)


def _answer_of(flight: Flight) -> Answer:
    if flight.answer is None:
        raise AssertionError("a flight that ends without an error has an answer")
    return flight.answer


def _is_engine_failure(exc: Exception) -> bool:
    """Return whether the engine failed, and didn't just refuse (RFC 5861, section 4)."""
    return not isinstance(exc, NotAnAnswerError) or exc.status in (500, 502, 503, 504)


def _is_unknown_reply(exc: Exception) -> bool:
    """Return whether the engine's reply was no error, but of a shape that we don't know."""
    return isinstance(exc, NotAnAnswerError) and exc.status < 400
