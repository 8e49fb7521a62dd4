"""Every route whose answers are kept: what is stored of it, and what is fresh each time."""

import asyncio

import orjson
import pytest
from aiohttp import web

from server.protocol.routes import CACHED_ROUTES
from tests.server.conftest import Front, Upstream, body, running, stream
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
_number = iter(range(1_000_000))


def response(status: str = "completed", **more) -> dict:
    item = {"id": "msg_1", "type": "message", "content": [{"type": "output_text", "text": "yes"}]}
    counts = {"input_tokens": 1, "output_tokens": 4}
    head = {"id": "resp_x", "created_at": 1, "object": "response", "max_output_tokens": 4}
    return head | {"status": status, "output": [item], "usage": counts} | more


def message(reason: str | None = "end_turn") -> dict:
    head = {"id": "chatcmpl-x", "type": "message", "content": [{"type": "text", "text": "yes"}]}
    return head | ({"stop_reason": reason} if reason else {})


def events(*parsed: dict) -> bytes:
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (each["type"].encode(), orjson.dumps(each)) for each in parsed
    )


def response_events(last: str = "response.completed", **more) -> bytes:
    unfinished = response("in_progress", output=[], usage=None)
    return events(
        {"type": "response.created", "response": unfinished, "sequence_number": 0},
        {"type": "response.in_progress", "response": unfinished, "sequence_number": 1},
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "yes"},
        {"type": last, "response": response(**more), "sequence_number": 3},
    )


def message_events(reason: str | None = "end_turn") -> bytes:
    return events(
        {"type": "message_start", "message": message(None)},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "y"}},
        {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}},
        {"type": "message_stop"},
    )


def asked(**more) -> dict:
    """A request of any route that nobody has sent before."""
    return {"input": f"question {next(_number)}", "temperature": 0} | more


def answering(*parts: bytes, kind: str = "text/event-stream; charset=utf-8"):
    async def handler(http: web.Request) -> web.StreamResponse:
        if len(parts) > 1 or kind.startswith("text"):
            return await stream(http, *parts)
        return web.Response(body=parts[0], content_type=kind)

    return handler


def json(parsed: dict):
    return answering(orjson.dumps(parsed), kind="application/json")


async def send(front: Front, path: str, request: dict, **options) -> tuple[str, bytes]:
    """Return Cache-Status and body of a request that joins no other."""
    async with asyncio.timeout(HANGS_S):
        while True:
            async with front.session.post(path, json=request, **options) as reply:
                status, content = reply.headers["Cache-Status"], await reply.read()
            if "collapsed" not in status:
                return status, content


def without(content: bytes, *fresh: bytes) -> bytes:
    for each in fresh:
        assert each in content
        content = content.replace(each, b"")
    return content


@pytest.mark.parametrize(
    ("path", "content", "prefix"),
    [
        (RESPONSES, response_events(), b"resp_"),
        (RESPONSES, response_events("response.incomplete", status="incomplete",
                                    incomplete_details={"reason": "max_output_tokens"}), b"resp_"),
        (MESSAGES, message_events(), b"chatcmpl-"),
        (MESSAGES, message_events("max_tokens"), b"chatcmpl-"),
    ],
)  # fmt: skip
async def test_a_stream_of_typed_events_is_replayed_as_it_came(
    front: Front, upstream: Upstream, path: str, content: bytes, prefix: bytes
) -> None:
    upstream.handler = answering(content)
    request, given = asked(stream=True), []
    for number, status in enumerate(("tierserve; fwd=miss", "tierserve; hit")):
        id_ = f"number-{number}"
        cache_status, reply = await send(front, path, request, headers={"X-Request-Id": id_})
        assert cache_status.startswith(status)
        assert b'"id":"' + prefix + id_.encode() + b'"' in reply
        given.append([part for part in reply.replace(id_.encode(), b"").split(b"\n\n") if part])
    assert len(upstream.asked) == 1
    first, second = given
    assert len(first) == content.count(b"event: ")
    for one, other, sent in zip(first, second, content.split(b"\n\n"), strict=False):
        (kind, data), (sent_kind, sent_data) = one.split(b"\n"), sent.split(b"\n")
        assert kind == sent_kind == other.split(b"\n")[0]
        parsed, expected = orjson.loads(data[6:]), orjson.loads(sent_data[6:])
        assert parsed.keys() == expected.keys()
        assert parsed.get("delta") == expected.get("delta")
        assert orjson.loads(other.split(b"\n")[1][6:]).get("delta") == expected.get("delta")
    assert b'"created_at":1,' not in b"".join(first)


@pytest.mark.parametrize(
    ("path", "parsed"), [(RESPONSES, response()), (MESSAGES, message()), (MESSAGES, message("x"))]
)
async def test_a_body_is_given_again_with_an_id_of_its_own(
    front: Front, upstream: Upstream, path: str, parsed: dict
) -> None:
    upstream.handler = json(parsed)
    request = asked()
    _, first = await send(front, path, request)
    status, second = await send(front, path, request)
    assert status.startswith("tierserve; hit")
    one, other = orjson.loads(first), orjson.loads(second)
    assert one.pop("id") != other.pop("id")
    assert one.pop("created_at", 2) > 1
    fresh = {"id", "created_at"}
    assert one == {name: value for name, value in parsed.items() if name not in fresh}
    assert {name: value for name, value in other.items() if name not in fresh} == one


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_neither_form_makes_the_other(front: Front, upstream: Upstream, path: str) -> None:
    is_message = path == MESSAGES
    request = asked()
    upstream.handler = json(message() if is_message else response())
    await send(front, path, request)
    upstream.handler = answering(message_events() if is_message else response_events())
    status, content = await send(front, path, request | {"stream": True})
    assert status == "tierserve; fwd=miss"
    assert content.startswith(b"event: ")
    assert (await send(front, path, request))[1].startswith(b"{")
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    ("path", "parsed"),
    [
        (RESPONSES, response("failed")),
        (RESPONSES, response("cancelled")),
        (RESPONSES, response(usage={"input_tokens": 1, "output_tokens": 0})),
        (RESPONSES, response("incomplete", incomplete_details=None)),
        (RESPONSES, response("incomplete", incomplete_details={"reason": "content_filter"})),
        (RESPONSES, response("incomplete", incomplete_details={"reason": "max_output_tokens"},
                             max_output_tokens=9)),
        (MESSAGES, message(None)),
    ],
)  # fmt: skip
async def test_unfinished_bodies_are_not_stored(
    front: Front, upstream: Upstream, path: str, parsed: dict
) -> None:
    upstream.handler = json(parsed)
    request = asked()
    for _ in range(2):
        status, content = await send(front, path, request)
        assert status == "tierserve; fwd=miss"
        assert orjson.loads(content).keys() == parsed.keys()
    assert len(upstream.asked) == 2


def ends_with(reason: str | None, status: int = 200):
    choice = {"index": 0, "text": "", "finish_reason": reason}

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [choice] if reason else []}, status=status)

    return handler


async def cut(http: web.Request) -> web.StreamResponse:
    http.transport.abort()
    return web.Response()


@pytest.mark.parametrize("form", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize(
    "token",
    [ends_with("abort"), ends_with(None), ends_with(None, 503), cut],
    ids=["aborts", "odd", "no", "cut"],
)
async def test_what_a_stopping_engine_calls_whole_is_not_stored(
    front: Front, upstream: Upstream, token, form: bool
) -> None:
    upstream.handler = answering(response_events()) if form else json(response())
    upstream.token = token
    request = asked(stream=form)
    for _ in range(3):
        status, content = await send(front, RESPONSES, request)
        assert status == "tierserve; fwd=miss"
        assert b"completed" in content
    assert len(upstream.asked) == 3


async def test_what_an_engine_that_is_no_vllm_calls_whole_is_stored(
    front: Front, upstream: Upstream
) -> None:
    upstream.handler, upstream.token = json(response()), ends_with(None, 404)
    request = asked()
    await send(front, RESPONSES, request)
    async with asyncio.timeout(HANGS_S):
        while "hit" not in (await send(front, RESPONSES, request))[0]:
            pass


ERROR = {"type": "error", "error": {"type": "internal_error", "message": "broken"}}


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (RESPONSES, response_events("response.failed", status="failed")),
        (RESPONSES, response_events("response.incomplete", status="incomplete",
                                    incomplete_details={"reason": "content_filter"})),
        (RESPONSES, response_events("response.completed", status="cancelled")),
        (RESPONSES, response_events(usage={"input_tokens": 1, "output_tokens": 0})),
        (RESPONSES, response_events().rpartition(b"event: ")[0] + events(ERROR)),
        (MESSAGES, message_events(None)),
        (MESSAGES, message_events().rpartition(b"event: ")[0] + events(ERROR)),
    ],
)  # fmt: skip
async def test_failed_streams_are_passed_on_and_not_stored(
    front: Front, upstream: Upstream, path: str, content: bytes
) -> None:
    upstream.handler = answering(content)
    request = asked(stream=True)
    for _ in range(2):
        status, reply = await send(front, path, request)
        assert status == "tierserve; fwd=miss"
        assert reply.count(b"event: ") == content.count(b"event: ")
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    ("path", "content"), [(RESPONSES, response_events()), (MESSAGES, message_events())]
)
@pytest.mark.parametrize("cut", ["before the last event", "within it", "in the connection"])
async def test_cut_streams_end_with_an_error_and_are_not_stored(
    front: Front, upstream: Upstream, path: str, content: bytes, cut: str
) -> None:
    start, event, end = content.rpartition(b"event: ")

    async def handler(http: web.Request) -> web.StreamResponse:
        if cut == "before the last event":
            return await stream(http, start)
        if cut == "within it":
            return await stream(http, start, event + end[:-9])
        response = await stream(http, start)
        http.transport.abort()
        return response

    upstream.handler = handler
    request = asked(stream=True)
    for _ in range(2):
        status, reply = await send(front, path, request)
        assert status == "tierserve; fwd=miss"
        *_, last = reply.strip().split(b"\n\n")
        kind, data = last.split(b"\n")
        assert kind == b"event: error"
        parsed = orjson.loads(data.removeprefix(b"data: "))
        assert parsed["type"] == "error"
        error = parsed["error"]
        assert error["type"] == "api_error" if path == MESSAGES else error["code"] == 502
    assert len(upstream.asked) == 2


FLAT = [path for path, route in CACHED_ROUTES.items() if route.deterministic]


@pytest.mark.parametrize("path", FLAT)
async def test_what_is_deterministic_by_nature_needs_no_temperature(
    front: Front, upstream: Upstream, path: str
) -> None:
    made = {"id": "embd-x", "object": "list", "created": 1, "data": [{"id": "x", "created": 1}]}
    upstream.handler = json(made)
    request = {"input": f"{next(_number)}", "prompt": "p", "stream": True}
    given = []
    for number, status in enumerate(("tierserve; fwd=miss", "tierserve; hit")):
        cache_status, reply = await send(
            front, path, request, headers={"X-Request-Id": f"n{number}"}
        )
        assert cache_status.startswith(status)
        parsed = orjson.loads(reply)
        assert parsed.pop("id") == f"{CACHED_ROUTES[path].id_prefix}n{number}"
        assert parsed.pop("created") > 1
        given.append(parsed)
    assert given[0] == given[1] == {"object": "list", "data": made["data"]}
    assert len(upstream.asked) == 1
    assert upstream.asked[0].path == path


@pytest.mark.parametrize("paths", [r.paths for r in CACHED_ROUTES.values() if len(r.paths) > 1])
async def test_the_paths_of_a_route_share_answers(
    front: Front, upstream: Upstream, paths: tuple[str, ...]
) -> None:
    upstream.handler = json({"id": "score-x", "results": []})
    request = asked()
    await send(front, paths[0], request)
    for path in paths:
        assert (await send(front, path, request))[0].startswith("tierserve; hit")


async def test_a_body_without_an_id_is_kept_as_it_is(front: Front, upstream: Upstream) -> None:
    raw = b'{"count":1,"tokens":[1],"id_of":"\\"id\\":1","x":{"id":"x","created":3}}'
    upstream.handler = answering(raw, kind="application/json")
    request = asked()
    assert (await send(front, "/tokenize", request))[1] == raw
    status, content = await send(front, "/tokenize", request)
    assert status.startswith("tierserve; hit")
    assert content == raw


@pytest.mark.parametrize(
    "raw", [b"\x00\x01", b"[]", b'{"error": {"code": 1}}', b'{"a":"\x00"}', b"{\x14\xae>"]
)
async def test_what_is_no_object_is_passed_on_and_not_stored(
    front: Front, upstream: Upstream, raw: bytes
) -> None:
    upstream.handler = answering(raw, kind="application/octet-stream")
    request = asked()
    for _ in range(2):
        async with front.session.post("/v1/embeddings", json=request) as reply:
            assert reply.status == 200
            assert reply.content_type == "application/octet-stream"
            assert await reply.read() == raw
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (RESPONSES, {"previous_response_id": "resp_1"}),
        (RESPONSES, {"background": True}),
        (RESPONSES, {"store": True}),
        (RESPONSES, {"request_id": "resp_mine"}),
        (RESPONSES, {"tools": [{"type": "web_search_preview"}]}),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        (MESSAGES, {"mcp_servers": [{"url": "http://h"}]}),
        ("/pooling", {"data": "http://h/a.tiff"}),
        ("/v2/embed", {"images": ["http://h/a.png"]}),
    ],
)
async def test_what_depends_on_more_than_its_json_goes_past_the_tiers(
    front: Front, upstream: Upstream, path: str, more: dict
) -> None:
    upstream.handler = json(response())
    request = asked(**more)
    for _ in range(2):
        assert (await send(front, path, request))[0] == "tierserve; fwd=bypass"
    assert len(upstream.asked) == 2


async def test_an_engine_that_keeps_responses_gives_its_own_ids(
    upstream: Upstream, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    upstream.handler = json(response())
    async with running(tmp_path, upstream) as front:
        request = asked()
        for _ in range(2):
            status, content = await send(front, RESPONSES, request)
            assert status == "tierserve; fwd=bypass"
            assert orjson.loads(content)["id"] == "resp_x"
        request["store"] = False
        await send(front, RESPONSES, request)
        assert (await send(front, RESPONSES, request))[0].startswith("tierserve; hit")


async def test_the_key_of_anthropics_clients_keeps_answers_apart(
    front: Front, upstream: Upstream
) -> None:
    upstream.handler = json(message())
    request = asked()
    for key in ("one", "two"):
        for status in ("tierserve; fwd=miss", "tierserve; hit"):
            cache_status, _ = await send(front, MESSAGES, request, headers={"X-Api-Key": key})
            assert cache_status.startswith(status)
    assert len(upstream.asked) == 2


async def test_other_routes_take_no_chat_for_an_answer(front: Front, upstream: Upstream) -> None:
    upstream.handler = json(body())
    for _ in range(2):
        status, content = await send(front, RESPONSES, request := asked())
        assert status == "tierserve; fwd=miss"
        assert orjson.loads(content) == body()
        assert (await send(front, RESPONSES, request))[0] == "tierserve; fwd=miss"
