"""An OpenTelemetry collector that tests can ask what it got."""

import asyncio
import secrets
from collections.abc import Callable

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.servers import free_port
from tests.waiting import HANGS_S, until_accepted


class Collector:
    """An OTLP collector, by HTTP."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.raw = b""
        self.spans: list[Span] = []
        self.resource: dict[str, object] = {}
        self.status, self.exports = 200, 0
        self._grown = asyncio.Event()

    async def start(self) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        await until_accepted()
        await self._runner.cleanup()

    async def _take(self, http: web.Request) -> web.Response:
        raw = await http.read()
        if self.status == 200:
            self.take(raw, ExportTraceServiceRequest.FromString(raw))
        self.exports += 1
        self._grow()
        return web.Response(status=self.status, content_type="application/x-protobuf")

    def take(self, raw: bytes, exported: ExportTraceServiceRequest) -> None:
        self.raw += raw
        for resource in exported.resource_spans:
            self.resource = attributes(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans
        self._grow()

    def _grow(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def until(self, is_there: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANGS_S):
            while not is_there():
                await self._grown.wait()

    async def trace(self, id_: str, *names: str) -> dict[str, Span]:
        """Return the spans of a trace by their names, once those named are there."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.trace_id.hex() == id_]

        await self.until(lambda: {span.name for span in found()} >= set(names))
        by_name = {span.name: span for span in found()}
        assert len(by_name) == len(found())
        return by_name


def attributes(of: object) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


def context(flags: str = "01") -> tuple[str, str, dict[str, str]]:
    """Return a client's trace id, span id and headers."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, {"traceparent": f"00-{trace}-{span}-{flags}", "tracestate": "them=1"}


def is_sampled(traceparent: str) -> bool:
    return bool(int(traceparent.rsplit("-", 1)[1], 16) & 1)
