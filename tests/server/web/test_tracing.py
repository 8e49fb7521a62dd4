"""Traces: what a collector gets of requests to the real process, and what their engine gets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.collector import Collector, attributes, context, is_sampled
from tests.server.conftest import CHAT, Front, Upstream, body, held, question, running
from tests.server.shared_tier import AVAILABLE, DEADLINE_MS
from tests.server.test_processes import at_last, until_asked, until_one_waits
from tests.servers import RedisServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVER, CLIENT = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT


@asynccontextmanager
async def traced(
    folder: Path, upstream: Upstream, *, shared: str | None = None, **tracing: object
) -> AsyncIterator[Front]:
    tiers = {} if shared is None else {"shared": {"url": shared, "deadline_ms": DEADLINE_MS}}
    async with AsyncExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIERSERVE__TRACING", orjson.dumps(tracing).decode())
            patch.setenv("TIERSERVE__MODELS__N__FALLBACK", "m")
            front = await stack.enter_async_context(running(folder, upstream, **tiers))
        yield front


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    made = Collector()
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(_upstream, collector, tmp_path_factory) -> AsyncIterator[Front]:
    folder = tmp_path_factory.mktemp("traced")
    async with traced(folder, _upstream, endpoint=collector.endpoint) as made:
        yield made


MISS = ("lookup memory", "lookup disk", "parse", "turn", "engine", "store", "flight")
TOP = f"POST {CHAT}"


@pytest.mark.parametrize("form", [{}, {"stream": True}])
async def test_a_miss_and_a_hit(front, upstream, collector, form: dict) -> None:
    asked = question(**form)
    trace, client, headers = context()
    status, cache_status, _ = await front.ask(asked, headers=headers)
    assert (status, cache_status) == (200, "tierserve; fwd=miss")
    names = MISS if form else (*MISS, "render")
    spans = await collector.trace(trace, TOP, *names)
    assert spans.keys() == {TOP, *names}
    top = spans.pop(TOP)
    assert (top.kind, top.parent_span_id.hex(), top.trace_state) == (SERVER, client, "them=1")
    assert {span.parent_span_id for span in spans.values()} == {top.span_id}
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in spans.values())
    assert all(span.status.code != Status.STATUS_CODE_ERROR for span in spans.values())
    values = attributes(top)
    assert values.pop("tierserve.request_id")
    assert values.pop("tierserve.key")
    same = {
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 1,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": CHAT,
        "network.protocol.version": "1.1",
        "url.path": CHAT,
        "url.scheme": "http",
    }
    assert values == same | {"tierserve.tier": "engine", "tierserve.outcome": "miss"}
    assert attributes(spans["lookup disk"]) == {"tierserve.tier": "disk", "tierserve.found": False}
    assert attributes(spans["flight"]) == {"tierserve.joined": False}
    assert spans["engine"].kind == CLIENT
    assert attributes(spans["engine"]) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": upstream.port,
    }
    # The engine's spans become children of ours.
    got = upstream.asked[-1].headers
    assert got.getall("traceparent") == [f"00-{trace}-{spans['engine'].span_id.hex()}-01"]
    assert got.getall("tracestate") == ["them=1"]

    trace, client, headers = context()
    _, cache_status, _ = await front.ask_alone(asked, headers=headers)
    assert "; hit; " in cache_status
    spans = await collector.trace(trace, TOP)
    assert spans.keys() == {TOP, "parse", "lookup memory", "render"}
    values = attributes(spans[TOP])
    assert values.pop("tierserve.request_id")
    assert values.pop("tierserve.key")
    assert values == same | {"tierserve.tier": "memory", "tierserve.outcome": "hit"}
    found = {"tierserve.tier": "memory", "tierserve.found": True}
    assert attributes(spans["lookup memory"]) == found


async def test_a_fallback_is_the_model_of_the_response(front, upstream, collector) -> None:
    async def only_m(http: web.Request) -> web.StreamResponse:
        is_m = orjson.loads(await http.read())["model"] == "m"
        return web.json_response(body(), status=200 if is_m else 503)

    upstream.handler = only_m
    trace, _, headers = context()
    assert (await front.ask(question(model="n"), headers=headers))[0] == 200

    def tops() -> list[Span]:
        # Other steps are there twice: of each model.
        return [s for s in collector.spans if s.trace_id.hex() == trace and s.name == TOP]

    await collector.until(tops)
    values = attributes(tops()[0])
    models = values["gen_ai.request.model"], values["gen_ai.response.model"]
    assert (models, values["tierserve.outcome"]) == (("n", "m"), "miss")


async def test_a_flight_tells_what_came_from_disk(front, upstream, collector) -> None:
    async def loaded(_: web.Request) -> web.StreamResponse:
        return web.json_response(body() | {"kv_transfer_params": {"prefix_disk_tokens": 1920}})

    upstream.handler = loaded
    trace, _, headers = context()
    await front.ask_alone(question(), headers=headers)
    spans = await collector.trace(trace, TOP, *MISS)
    expected = {"tierserve.joined": False, "tierserve.disk_tokens": 1920}
    assert attributes(spans["flight"]) == expected


async def test_who_joins_a_flight_waits_for_another_ones_engine(front, upstream, collector) -> None:
    go = asyncio.Event()
    upstream.handler = held(go)
    asked = question(stream=True)
    contexts = [context(), context()]
    async with (
        front.post(asked, headers=contexts[0][2]) as first,
        front.post(asked, headers=contexts[1][2]) as second,
    ):
        go.set()
        assert await first.read()
        assert await second.read()
    spans = await collector.trace(contexts[0][0], TOP, *MISS)
    assert attributes(spans["flight"]) == {"tierserve.joined": False}
    spans = await collector.trace(contexts[1][0], TOP)
    assert attributes(spans["flight"]) == {"tierserve.joined": True}
    assert spans.keys() == {TOP, "parse", "lookup memory", "lookup disk", "flight"}


async def test_who_waits_for_another_process_has_a_turn(upstream, collector, tmp_path) -> None:
    go = asyncio.Event()
    upstream.handler = at_last(go)
    redis = RedisServer(tmp_path)
    try:
        async with AsyncExitStack() as stack:
            fronts = []
            for name in ("a", "b"):
                (tmp_path / name).mkdir()
                made = traced(
                    tmp_path / name, upstream, shared=redis.url, endpoint=collector.endpoint
                )
                fronts.append(await stack.enter_async_context(made))
            one, other = fronts
            for each in fronts:
                # Until then each generates by itself.
                await each.until_metric(AVAILABLE, 1)
            asked, (trace, _, headers) = question(), context()
            first = asyncio.create_task(one.ask(asked))
            await until_asked(upstream)
            second = asyncio.create_task(other.ask(asked, headers=headers))
            await until_one_waits(other)
            go.set()
            assert (await first)[1] == "tierserve; fwd=miss"
            assert (await second)[1] == "tierserve; fwd=miss; collapsed"
            lookups = [f"lookup {tier}" for tier in ("memory", "disk", "shared")]
            spans = await collector.trace(trace, TOP)
            assert spans.keys() == {TOP, "parse", *lookups, "flight", "turn", "render"}
            assert attributes(spans[TOP])["tierserve.outcome"] == "collapsed"
            waited, looked = spans["turn"], spans["lookup shared"]
            assert waited.start_time_unix_nano >= looked.end_time_unix_nano
            assert waited.end_time_unix_nano <= spans["flight"].end_time_unix_nano
    finally:
        redis.kill()


async def test_an_engines_error_is_seen(front, upstream, collector) -> None:
    async def failing(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no"}}, status=500)

    upstream.handler = failing
    trace, _, headers = context()
    status, _, _ = await front.ask(question(), headers=headers)
    assert status == 500
    spans = await collector.trace(trace, TOP, "engine")
    assert spans["engine"].status.code == spans[TOP].status.code == Status.STATUS_CODE_ERROR
    assert attributes(spans["engine"])["http.response.status_code"] == 500
    assert attributes(spans[TOP])["error.type"] == "500"
    assert attributes(spans[TOP])["tierserve.outcome"] == "error"


async def test_a_client_that_goes_is_seen(front, upstream, collector) -> None:
    upstream.handler = held(asyncio.Event())
    trace, _, headers = context()
    async with front.post(question(stream=True), headers=headers) as response:
        await response.content.readany()
    spans = await collector.trace(trace, TOP, "engine", "flight")
    assert attributes(spans["engine"])["error.type"] == "CancelledError"
    assert "http.response.status_code" not in attributes(spans[TOP])
    assert attributes(spans[TOP])["error.type"] == "CancelledError"


async def test_other_routes_are_traced_but_ours_are_not(front, upstream, collector) -> None:
    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "1"})

    upstream.handler = version
    trace, _, headers = context()
    for path in ("/health", "/ready", "/metrics", "/version?key=s3cr3t"):
        async with front.session.get(path, headers=headers) as response:
            assert response.status == 200
            await response.read()
    spans = await collector.trace(trace, "GET", "engine")
    assert spans.keys() == {"GET", "engine"}
    assert attributes(spans["GET"])["url.path"] == "/version"
    assert attributes(spans["GET"])["tierserve.outcome"] == "pass"


async def test_what_a_client_does_not_sample_is_not_traced(front, upstream, collector) -> None:
    unsampled, _, headers = context("00")
    await front.ask(question(), headers=headers)
    version, trace, _, flags = upstream.asked[-1].headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", unsampled, "00")
    sampled, _, headers = context()
    await front.ask(question(), headers=headers)
    await collector.trace(sampled, TOP)
    assert unsampled not in {span.trace_id.hex() for span in collector.spans}


@pytest.mark.parametrize(
    "given",
    ["", "00-0-0-01", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "x" * 600, "ff-" + "1" * 60],
)
async def test_a_context_that_is_wrong_is_none(front, upstream, collector, given: str) -> None:
    await front.ask(question(), headers={"traceparent": given, "tracestate": "?"})
    trace = upstream.asked[-1].headers["traceparent"].split("-")[1]
    top = (await collector.trace(trace, TOP))[TOP]
    assert top.parent_span_id == b""
    assert given not in front.log.read_text() or not given


async def test_nothing_that_was_said_is_told(front, upstream, collector) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body("4nswer"))

    upstream.handler = answer
    trace, _, headers = context()
    asked = question(messages=[{"role": "user", "content": "pr0mpt"}])
    await front.ask(asked, headers=headers | {"Authorization": "Bearer s3cr3t"})
    await collector.trace(trace, TOP, "store")
    # Random ids are there, too, in which shorter ones would be found by chance.
    for secret in (b"pr0mpt", b"s3cr3t", b"4nswer"):
        assert secret not in collector.raw
    assert collector.resource["service.name"] == "tierserve"


async def test_only_a_part_is_traced(upstream, collector, tmp_path) -> None:
    async with traced(tmp_path, upstream, endpoint=collector.endpoint, sample_ratio=0) as front:
        await front.ask(question())
        unsampled = upstream.asked[-1].headers["traceparent"]
        # The engine doesn't trace it either.
        assert not is_sampled(unsampled)
        trace, _, headers = context()
        await front.ask(question(), headers=headers)
        await collector.trace(trace, TOP)
        assert unsampled.split("-")[1] not in {span.trace_id.hex() for span in collector.spans}


async def test_what_is_still_to_be_sent_is_sent_at_a_stop(upstream, collector, tmp_path) -> None:
    trace, _, headers = context()
    async with traced(tmp_path, upstream, endpoint=collector.endpoint + "/v1/traces") as front:
        await front.ask(question(), headers=headers)
    assert front.process.returncode == 0
    await collector.trace(trace, TOP, "store")


async def test_a_collector_by_grpc(upstream, tmp_path) -> None:
    loop, got = asyncio.get_running_loop(), Collector()

    class Service(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, _: object):  # noqa: N802
            loop.call_soon_threadsafe(got.take, request.SerializeToString(), request)
            return ExportTraceServiceResponse()

    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        add_TraceServiceServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            endpoint = f"http://127.0.0.1:{port}"
            async with traced(tmp_path, upstream, endpoint=endpoint, protocol="grpc") as front:
                trace, _, headers = context()
                await front.ask(question(), headers=headers)
                spans = await got.trace(trace, TOP, *MISS, "render")
                assert spans[TOP].kind == SERVER
        finally:
            server.stop(None).wait()


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_collector_that_is_down_disturbs_nobody(
    upstream, tmp_path, hangs: bool, protocol: str
) -> None:
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        if hangs:
            hanging.listen()
        endpoint = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        async with traced(tmp_path, upstream, endpoint=endpoint, protocol=protocol) as front:
            asked = question()
            assert (await front.ask(asked))[0] == 200
            assert "; hit; " in (await front.ask_alone(asked))[1]
    assert front.process.returncode == 0
    log = front.log.read_text()
    assert "Traceback" not in log
    assert "xport" not in log


async def test_a_collector_that_refuses_is_told_of_once(upstream, tmp_path) -> None:
    collector = Collector()
    await collector.start()
    collector.status = 400
    async with traced(tmp_path, upstream, endpoint=collector.endpoint) as front:
        for number in range(3):
            await front.ask(question())
            await collector.until(lambda number=number: collector.exports > number)
        collector.status = 200
        trace, _, headers = context()
        await front.ask(question(), headers=headers)
        await collector.trace(trace, TOP)
    await collector.stop()
    log = front.log.read_text()
    assert log.count("spans can't be sent") == log.count("again") == 1
    assert "xport" not in log


async def test_without_tracing_headers_pass_as_they_are(upstream, tmp_path) -> None:
    async with running(tmp_path, upstream) as front:
        await front.ask(question())
        assert "traceparent" not in upstream.asked[-1].headers
        _, _, headers = context()
        await front.ask(question(), headers=headers)
        assert upstream.asked[-1].headers["traceparent"] == headers["traceparent"]
        assert upstream.asked[-1].headers["tracestate"] == "them=1"
