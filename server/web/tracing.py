"""Tracing: requests and their steps as OpenTelemetry spans, sent to a collector by OTLP.

A request has a server span, the child of its client's span if there is one. Attributes are named by
OpenTelemetry's semantic conventions for HTTP and for generative AI, our own `tierserve.*`. None
holds a prompt, an answer, or a header. Spans that the collector doesn't take are dropped, and no
request waits for it. Imported only where tracing is on, since it needs the extra `tracing`.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from urllib.parse import urlsplit

from aiohttp import web
from multidict import CIMultiDict
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.config.base import VERSION
from server.config.tracing import TracingConfig as Options
from server.protocol.routes import route_of
from server.protocol.usage import input_tokens, output_tokens
from server.telemetry.served import OWN, Served
from server.telemetry.spans import UNTRACED, EngineSpan, TracedStep, current
from server.web.request import Endpoint, HttpRequest

logger = logging.getLogger(__name__)

# The spans of some thousand requests; the SDK drops more.
_QUEUED_SPANS = 8192
_BATCH_SPANS = 512
_EXPORT_EVERY_MS = 1000
_EXPORT_TIMEOUT_S = 5
# For the spans that are still queued; a collector that hangs must not delay the exit.
_CLOSE_TIMEOUT_S = 2
_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
_PROPAGATOR = TraceContextTextMapPropagator()
_PARENT, _STATE = "traceparent", "tracestate"


class Tracing:
    """Traces requests.

    Args:
        options: where spans are sent, and which share of the requests is traced.
    """

    def __init__(self, options: Options) -> None:
        # Clients could fill our log with invalid headers, and a collector that is down could, too.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        # It warns, three times a minute at most, of spans that are dropped.
        logging.getLogger("opentelemetry.sdk._shared_internal").setLevel(logging.WARNING)
        service = Resource({"service.name": "tierserve", "service.version": VERSION})
        self._provider = TracerProvider(
            resource=service.merge(OTELResourceDetector().detect()),
            sampler=ParentBased(TraceIdRatioBased(options.sample_ratio)),
            shutdown_on_exit=False,
        )
        exporter = _Exporter(_exporter(options), options.endpoint)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_QUEUED_SPANS,
                max_export_batch_size=_BATCH_SPANS,
                schedule_delay_millis=_EXPORT_EVERY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("tierserve")

    def traced(self, endpoint: Endpoint, route: str | None = None) -> Endpoint:
        """Return `endpoint` with a span for each request; `route` is its path, if it has one."""

        async def around(http: HttpRequest) -> web.StreamResponse:
            method = http.method if http.method in _METHODS else "_OTHER"
            span = self._tracer.start_span(
                f"{method} {route}" if route else method, _parent(http), SpanKind.SERVER
            )
            trace = _Trace(self._tracer, span)
            token = current.set(trace)
            try:
                response = await endpoint(http)
                if span.is_recording():
                    _set_status(span, response.status)
            except BaseException as exc:
                _set_failure(span, exc)
                raise
            finally:
                current.reset(token)
                if span.is_recording():
                    _set_request(span, http, trace.served, method, route)
                    span.end()
            return response

        return around

    def close(self) -> None:
        """Send the spans that are still queued, but don't wait long for that."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)


class _Trace:
    """The trace of one request, whose server span is `span`."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self.served = OWN

    def set_served(self, served: Served) -> None:
        self.served = served

    @cached_property
    def _context(self) -> Context:
        return set_span_in_context(self._span, Context())

    def step(self, name: str) -> TracedStep:
        if not self._span.get_span_context().trace_flags.sampled:
            return UNTRACED
        return _Step(self._tracer.start_span(name, self._context))

    def engine_request(self, method: str) -> EngineSpan:
        # Also where it isn't sampled, so that the engine doesn't sample it either.
        span = self._tracer.start_span("engine", self._context, SpanKind.CLIENT)
        span.set_attribute("http.request.method", method)
        return _EngineRequest(span)


class _Step(TracedStep):
    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    def __exit__(self, *exc: object) -> None:
        if isinstance(exc[1], BaseException):
            _set_failure(self._span, exc[1])
        self.end()

    def set_attributes(self, **attributes: str | int | bool) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"tierserve.{name}", value)

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()


class _EngineRequest(_Step, EngineSpan):
    __slots__ = ()

    def inject(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        context: dict[str, str] = {}
        _PROPAGATOR.inject(context, set_span_in_context(self._span, Context()))
        changed = CIMultiDict(headers)
        for name in (_PARENT, _STATE):
            changed.popall(name, None)
        changed.update(context)
        return changed

    def set_reply(self, status: int, host: str | None, port: int | None) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if host is not None and port is not None:
            self._span.set_attributes({"server.address": host, "server.port": port})
        if status >= 400:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))


class _Exporter(SpanExporter):
    """An exporter that logs when it begins to fail, and when it succeeds again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning(
                "spans can't be sent to %s; they are dropped until they can", self._endpoint
            )
        elif self._is_failing and not is_failing:
            logger.warning("spans are sent to %s again", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _exporter(options: Options) -> SpanExporter:
    # Each is slow to import, and only one is needed.
    if options.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(options.endpoint, timeout=_EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    has_path = urlsplit(options.endpoint).path.strip("/")
    url = options.endpoint if has_path else options.endpoint.rstrip("/") + "/v1/traces"
    return Http(url, timeout=_EXPORT_TIMEOUT_S)


def _parent(http: HttpRequest) -> Context:
    """Return the client's trace context, or an empty one where its headers hold no valid one."""
    if _PARENT not in http.headers:
        return Context()
    # Of two, neither is valid (W3C Trace Context, section 3.2).
    headers = {name: http.headers.getall(name, []) for name in (_PARENT, _STATE)}
    return _PROPAGATOR.extract(headers, Context()) if len(headers[_PARENT]) == 1 else Context()


def _set_status(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))


def _set_failure(span: Span, exc: BaseException) -> None:
    # Its type alone: its text may quote the prompt.
    span.set_attribute("error.type", type(exc).__qualname__)
    if isinstance(exc, Exception):
        span.set_status(Status(StatusCode.ERROR))


def _set_request(
    span: Span, http: HttpRequest, served: Served, method: str, route: str | None
) -> None:
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "network.protocol.version": f"{http.version.major}.{http.version.minor}",
        "tierserve.outcome": served.outcome,
        "tierserve.request_id": http.id,
        "tierserve.tier": served.tier,
        "url.path": _text(http.path),
        "url.scheme": http.scheme,
    }
    if route is not None:
        attributes["http.route"] = route
        if (operation := route_of(route).operation) is not None:
            attributes["gen_ai.operation.name"] = operation
    if served.model:
        attributes["gen_ai.request.model"] = served.asked or served.model
        if served.asked:
            attributes["gen_ai.response.model"] = served.model
    if (answer := served.answer) is not None:
        attributes["tierserve.key"] = served.key
        for name, count in (("input", input_tokens(answer)), ("output", output_tokens(answer))):
            if count is not None:
                attributes[f"gen_ai.usage.{name}_tokens"] = count
    span.set_attributes(attributes)


def _text(text: str) -> str:
    """Return text without lone surrogates, for which a whole batch would be refused."""
    return text.encode(errors="backslashreplace").decode()
