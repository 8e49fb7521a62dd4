"""The road of a request that may be cached: parse, lookup, single flight, engine, store, render."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import floor, inf

import aiohttp
from aiohttp import hdrs, web

from server.config.base import CENTURY_S
from server.engine.models import Models
from server.engine.upstream import UnavailableError
from server.handlers.forwarding import forward
from server.handlers.recording import NotAnAnswerError, record_answer
from server.handlers.rendering import _JSON, _begin, _cut, _failed, _fresh, _not_cached, _render
from server.handlers.upstream_headers import (
    LOAD,
    LOAD_FORMAT,
    cacheable_request_headers,
    forwarded_headers,
    with_cache_control,
)
from server.handlers.variants import Variants
from server.protocol import convert, template
from server.protocol.cache_control import CacheControl, limit_freshness, parse_cache_control
from server.protocol.formats import Encoding
from server.protocol.request import ParsedRequest, RequestParser, key_headers
from server.protocol.usage import counts_in
from server.telemetry.prefixes import Prefixes
from server.telemetry.spans import step
from server.web.offload import offload
from server.web.request import HttpRequest
from server.web.responses import error_response
from tiers import Answer, Chain, Flight, Freshness, GenerationLock, Hit, SingleFlight, State
from tiers.singleflight.flight import Subscriber

logger = logging.getLogger(__name__)

_NOTHING_SAID = CacheControl()
_ANEW = CacheControl(no_cache=True)
# Above, those who wait for an answer need the engine more.
_REFRESH_BELOW = 32


class CachedRoutes:
    """The handler of the routes whose answers are kept.

    Args:
        chain: where answers are kept.
        flights: the generations under way.
        turns: which of them are another process's to make.
        models: asked on a miss.
        freshness: tells how long the answers of a route and a model are good for.
        nondeterministic: whether requests that ask for chance are cached too: `never`, `always`,
            or `per_request`, where they say so.
        variants: how many answers such requests are given in turn, if they don't say.
        obeys: whether an upstream's `Cache-Control` counts.
        engine_keeps: whether the engine keeps answers itself, under ids that it gives.
        max_prompts: that one request may have.
        prefixes: counts how the prompts begin that engines are asked.
    """

    def __init__(
        self,
        *,
        chain: Chain,
        flights: SingleFlight,
        turns: GenerationLock,
        models: Models,
        freshness: Callable[[str, str], Freshness],
        nondeterministic: str,
        variants: int,
        max_prompts: int,
        prefixes: Prefixes,
        obeys: bool,
        engine_keeps: bool,
    ) -> None:
        self._chain, self._flights, self._turns = chain, flights, turns
        self._models, self._freshness = models, freshness
        self._parser = RequestParser()
        self._nondeterministic, self._engine_keeps = nondeterministic, engine_keeps
        self._variants, self._turn_of = variants, Variants()
        self._max_prompts, self._prefixes, self._obeys = max_prompts, prefixes, obeys

    async def answer(self, http: HttpRequest) -> web.StreamResponse:
        """Answer from a tier, from a running flight, or from the engine.

        Raises:
            BadRequestError: the request can't be understood, or has too many prompts.
        """
        raw = await http.read_body()
        with step("parse"):
            names, told = self._models.names(), key_headers(http.headers)
            request = await offload(
                len(raw), self._parser.parse, http.path, raw, http.tenant, names, told
            )
        http.model = request.model
        if request.id is not None:
            http.take_id_from_body(request.id)
        request.prompts.check(self._max_prompts)
        if request.cache.variants is not None and not self._takes_variants(request):
            text = "cache.variants is for answers that are kept by chance; cache.mode should be use"
            return error_response(400, text, param="cache.variants")
        control = parse_cache_control(", ".join(http.headers.getall(hdrs.CACHE_CONTROL, ())))
        if request.cache.control != _NOTHING_SAID:
            control = control.merge(request.cache.control)
        if self._may_keep(http, request) and not control.no_store:
            try:
                return await self._answer(http, request, control)
            except convert.NotConvertibleError as exc:
                logger.warning("an answer was given in one form and asked for in another: %s", exc)
        if control.only_if_cached:
            return _not_cached()
        upstreams = self._models.upstreams(request.model)
        return await forward(
            http,
            upstreams,
            body=request.raw,
            headers=with_cache_control(forwarded_headers(http), request.cache.control),
            cache_status="tierserve; fwd=bypass",
            # Any other may start work in the background, or run tools there.
            repeatable=request.repeatable,
            # Who says no-store wants nothing of it to be kept.
            ended=None if control.no_store else partial(self._prefixes.note, request),
        )

    def _may_keep(self, http: HttpRequest, request: ParsedRequest) -> bool:
        # The engine knows what else another type of content may mean, or a query: on these routes
        # a vLLM reads none.
        return (
            request.repeatable
            and (request.deterministic or self._keeps_chance(request))
            and not (request.engine_would_keep and self._engine_keeps)
            and (request.is_vllm or "?" not in http.raw_path)
            and http.media_type == _JSON
        )

    def _takes_variants(self, request: ParsedRequest) -> bool:
        return request.cache.use or self._nondeterministic == "always"

    def _keeps_chance(self, request: ParsedRequest) -> bool:
        says = self._nondeterministic
        return says == "always" or (says == "per_request" and request.cache.use)

    async def _answer(
        self, http: HttpRequest, request: ParsedRequest, control: CacheControl
    ) -> web.StreamResponse:
        if not request.deterministic and (count := request.cache.variants or self._variants) > 1:
            request = request._replace(key=self._turn_of.next(request.key, count))
        hit = None if control.no_cache else await self._chain.lookup(request.key)
        if (landing := self._landing(request, hit, control)) is not None:
            why, listener, joined = "miss", landing.subscribe(), True
        elif hit is not None and control.accepts(hit.entry, hit.state, self._chain.clock()):
            if hit.refresh:
                self._refresh(http, request, hit)
            return await self._render_hit(http, request, hit, "hit")
        elif control.only_if_cached:
            return _not_cached()
        else:
            why = _why(hit, control)
            listener, joined = self._join(http, request, hit, control)
        told = partial(_told, http, why, listener.flight, joined=joined)
        told()
        stale = None if control.limits_age else hit
        try:
            async with listener:
                with step("flight") as flight:
                    flight.set_attributes(joined=joined)
                    # Once a response has begun, a stale answer can't be given instead.
                    waits = stale is not None
                    return await self._listen(http, request, listener, told, waits=waits)
        except (NotAnAnswerError, UnavailableError, aiohttp.ClientError, OSError) as exc:
            if http.is_disconnected:
                # Not the flight has failed: this client has gone.
                raise ConnectionResetError from exc
            if _is_no_error(exc) and listener.flight.encoding != request.encoding:
                raise convert.NotConvertibleError("it isn't understood") from exc
            if stale is not None and self._stands_in(request, stale, exc):
                status = f"; fwd-status={exc.status}" if isinstance(exc, NotAnAnswerError) else ""
                return await self._render_hit(http, request, stale, f"fwd=stale{status}")
            failed = _failed(exc)
            failed.headers["Cache-Status"] = told()
            http.outcome = ("engine", "error" if failed.status >= 400 else "pass")
            return failed

    def _landing(
        self, request: ParsedRequest, hit: Hit | None, control: CacheControl
    ) -> Flight | None:
        """Return the flight whose answer others were given already, and which no tier holds yet."""
        flight = self._flights.storing(request.key)
        if flight is None or control.no_cache or control.limits_age:
            return None
        return None if hit is not None and hit.entry.answer == flight.answer else flight

    def _join(
        self, http: HttpRequest, request: ParsedRequest, hit: Hit | None, control: CacheControl
    ) -> tuple[Subscriber, bool]:
        """Listen to the flight that brings an answer; returns whether it was under way."""
        newer_than = _newer_than(hit, control, self._chain.clock())
        headers = cacheable_request_headers(http, request.cache.control)
        produce = partial(self._produce, request, headers, newer_than)
        origin = self._chain.provenance(request.labels)
        # What another waits for may come out of a cache on the way, as old as that one takes.
        says = str(control) if control.no_cache or control.limits_age else ""
        return self._flights.join(request.key, request.encoding, produce, origin, variant=says)

    def _stands_in(self, request: ParsedRequest, hit: Hit, exc: Exception) -> bool:
        """Whether a stale answer may be given for one that could not be had."""
        # It may have been purged while the engine was asked.
        return _cannot_answer(exc) and not self._chain.purges.is_purged(request.key, hit.entry)

    def _refresh(self, http: HttpRequest, request: ParsedRequest, hit: Hit) -> None:
        """Have a new answer made in the background, in place of the one that is given out now."""
        if self._models.upstreams(request.model).ready and len(self._flights) < _REFRESH_BELOW:
            # Else another cache on the way would give what it holds.
            headers = cacheable_request_headers(http, _ANEW)
            produce = partial(self._produce, request, headers, hit.entry.stored_at)
            origin = self._chain.provenance(request.labels)
            self._flights.start_background(request.key, request.encoding, produce, origin)

    async def _render_hit(
        self, http: HttpRequest, request: ParsedRequest, hit: Hit, how: str
    ) -> web.StreamResponse:
        entry = hit.entry
        # Another machine's clock may be a little ahead.
        now = max(self._chain.clock(), entry.stored_at)
        ttl, age = floor(entry.expires_at - now), int(now - entry.stored_at)
        status = f"tierserve; {how}; ttl={ttl}; detail={hit.tier}"
        response = await _render(http, request, entry.answer, status, age)
        http.found, http.saved_s = (request, entry.answer), entry.generation_s
        http.outcome = (hit.tier, "hit" if hit.state is State.FRESH else "stale")
        return response

    async def _listen(
        self,
        http: HttpRequest,
        request: ParsedRequest,
        listener: Subscriber,
        told: Callable[[], str],
        *,
        waits: bool,
    ) -> web.StreamResponse:
        """Give out what a flight brings; `told` says how, once it has brought something.

        A stream begins when the engine's does, which may be long before its first event, or with
        that event if it `waits`.

        Raises:
            NotAnAnswerError, UnavailableError, aiohttp.ClientError, OSError: it failed before
                anything was given out.
            NotConvertibleError: its answer can't be given in the form that was asked for.
        """
        flight = listener.flight
        if not request.encoding == flight.encoding == Encoding.SSE:
            async for _ in listener:
                pass
            if (load := flight.loads.get(http.headers.get(LOAD_FORMAT, ""))) is not None:
                # A hit has no such header: it costs the engine nothing, whose load now isn't known.
                http.response_headers = {**http.response_headers, LOAD: load}
            whole = await _render(http, request, _answer_of(flight), told(), int(flight.age_s))
            _note(http, request, flight)
            return whole
        id_, created = _fresh(http, request)
        response: web.StreamResponse | None = None
        try:
            async for event in listener:
                if waits and not event:
                    continue
                if response is None:
                    response = await _begin(http, told(), int(flight.age_s))
                if event:
                    said = template.render_item(
                        event, id_, created, wants_usage=request.wants_usage
                    )
                    await http.write(response, said)
        except (NotAnAnswerError, aiohttp.ClientError, OSError) as exc:
            if response is None or http.is_disconnected:
                raise
            http.outcome = ("engine", "error")
            return await _cut(response, _failed(exc), request)
        _note(http, request, flight)
        response = response or await _begin(http, told(), int(flight.age_s))
        tail = _answer_of(flight).trailer if request.wants_usage else b""
        await http.write(
            response, template.fill_marks(tail, id_, created) + request.route.format.done
        )
        await response.write_eof()
        return response

    async def _produce(
        self, request: ParsedRequest, headers: Mapping[str, str], newer_than: float, flight: Flight
    ) -> None:
        """Publish what another process has generated, or else what an engine says."""
        with step("turn") as turn:
            async with self._turns.acquire(
                request.key, flight.provenance.purge_epoch, newer_than
            ) as answer:
                turn.end()
                if answer is not None and answer.encoding != flight.encoding:
                    answer = await _converted(answer, flight.encoding)
                if answer is None:
                    await self._generate(request, headers, flight)
                    return
        flight.collapsed = True
        await flight.publish(answer.content)
        flight.end(answer, kept=True)

    async def _generate(
        self, request: ParsedRequest, headers: Mapping[str, str], flight: Flight
    ) -> None:
        """Have an engine answer, publish what it says, and store a finished answer."""
        started = time.monotonic()
        upstreams = self._models.upstreams(request.model)
        async with upstreams.request(
            "POST", request.path, data=request.body, headers=headers, repeatable=True
        ) as reply:
            flight.age_s = _age_s(reply.headers)
            if LOAD_FORMAT in headers and LOAD in reply.headers:
                flight.loads = {headers[LOAD_FORMAT]: reply.headers[LOAD]}
            answer, finished = await record_answer(
                reply,
                request.route.format,
                request.encoding,
                flight.publish,
                self._flights.max_bytes,
            )
        freshness = self._kept_for(request, reply)
        finished = finished and freshness is not None
        flight.end(answer, kept=finished)
        if finished and request.route.format.hides_aborts:
            finished = await upstreams.goes_on(reply, request.path, request.model, headers)
        if finished and freshness is not None:
            took_s = time.monotonic() - started
            self._flights.mark_storing(request.key, flight)
            with step("store"):
                await self._chain.store(
                    request.key,
                    answer,
                    freshness,
                    provenance=flight.provenance,
                    generation_s=took_s,
                    age_s=flight.age_s,
                )
        self._prefixes.note(request, counts_in(answer))

    def _kept_for(self, request: ParsedRequest, reply: aiohttp.ClientResponse) -> Freshness | None:
        """Return how long the answer in a reply is good for; `None` if it isn't to be kept."""
        freshness = self._freshness(request.route.path, request.model)
        if request.cache.ttl_s is not None:
            freshness = freshness._replace(ttl_s=request.cache.ttl_s)
        if not self._obeys:
            return freshness
        control = ", ".join(reply.headers.getall(hdrs.CACHE_CONTROL, ()))
        return limit_freshness(control, freshness, is_stream=request.encoding == Encoding.SSE)


async def _converted(answer: Answer, form: int) -> Answer | None:
    """Return another process's answer in that form, if it can be made of it."""
    try:
        return await offload(len(answer.content), convert.convert, answer, Encoding(form))
    except convert.NotConvertibleError:
        return None


def _age_s(headers: Mapping[str, str]) -> float:
    """Return how old an engine's answer is, which has one if a cache stands before the engine."""
    age = headers.get(hdrs.AGE, "")
    return min(float(age), CENTURY_S) if age.isascii() and age.isdecimal() else 0


def _told(http: HttpRequest, why: str, flight: Flight, *, joined: bool) -> str:
    """Note how a request is answered that no tier answers; returns the Cache-Status."""
    collapsed = joined or flight.collapsed
    http.outcome = ("engine", "collapsed" if collapsed else "miss")
    return f"tierserve; fwd={why}{'; collapsed' if collapsed else ''}"


def _answer_of(flight: Flight) -> Answer:
    if flight.answer is None:
        raise AssertionError("a flight that ends without an error has an answer")
    return flight.answer


def _why(hit: Hit | None, control: CacheControl) -> str:
    """Return why a request goes on to the engine (RFC 9211, section 2.2)."""
    if control.no_cache or (hit is not None and hit.state is State.FRESH):
        return "request"
    return "stale" if hit is not None else "miss"


def _newer_than(hit: Hit | None, control: CacheControl, now: float) -> float:
    """Return when an answer must at least have been stored (Unix s) to be as good as a new one.

    `inf` asks for one of the engine's.
    """
    if control.no_cache:
        return inf
    if control.limits_age:
        return now
    return 0 if hit is None else hit.entry.stored_at


def _note(http: HttpRequest, request: ParsedRequest, flight: Flight) -> None:
    """Note what was found, if it is to be kept."""
    if flight.kept:
        http.found = request, _answer_of(flight)


def _cannot_answer(exc: Exception) -> bool:
    """Whether an engine can't answer, as opposed to won't (RFC 5861, section 4)."""
    return not isinstance(exc, NotAnAnswerError) or exc.status in (500, 502, 503, 504)


def _is_no_error(exc: Exception) -> bool:
    """Whether it is a reply that was only not understood."""
    return isinstance(exc, NotAnAnswerError) and exc.status < 400
