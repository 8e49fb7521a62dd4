"""Errors of ours where Anthropic's API is asked, as its documentation and its client have them."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import anthropic
import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from server.config.secrets import hash_key, new_key
from tests.server.conftest import CHAT, Front, Upstream, running, stream
from tests.server.handlers.test_cached_routes import MESSAGES, message, message_events

pytestmark = pytest.mark.asyncio(loop_scope="module")

COUNT = f"{MESSAGES}/count_tokens"
KEYS = {name: new_key() for name in ("one", "few")}
HELLO = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
ONLY_CACHED = {"Cache-Control": "only-if-cached"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    """A server with a tenant who may ask, and one who may ask once a minute."""
    folder = tmp_path_factory.mktemp("anthropic")
    few = {"keys": [hash_key(KEYS["few"])], "requests_per_minute": 1}
    tenants = {"one": {"keys": [hash_key(KEYS["one"])], "operator": True}, "few": few}
    (folder / "tenants.json").write_bytes(orjson.dumps(tenants))
    sections = {"tenants": {"file": "tenants.json"}}
    async with running(folder, _upstream, sections=sections, headers=key("one")) as made:
        yield made


def key(name: str) -> dict[str, str]:
    return {"x-api-key": KEYS[name]}


async def error(front: Front, path: str, **options) -> tuple[int, str]:
    async with front.session.post(path, **options) as reply:
        return await error_in(reply)


async def error_in(reply: aiohttp.ClientResponse) -> tuple[int, str]:
    """Return status and type of an error that is as Anthropic has it."""
    assert reply.content_type == "application/json"
    body = await reply.json()
    assert body.keys() == {"type", "error"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["message"]
    return reply.status, body["error"]["type"]


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"data": b"{"}, (400, "invalid_request_error")),
        ({"json": HELLO | {"cache": 1}}, (400, "invalid_request_error")),
        ({"data": b"x", "headers": {"Content-Encoding": "gzip"}}, (400, "invalid_request_error")),
        ({"json": HELLO, "headers": {"x-api-key": "x"}}, (401, "authentication_error")),
        ({"json": HELLO | {"model": "no"}}, (404, "not_found_error")),
        ({"data": bytes(100_001)}, (413, "request_too_large")),
        ({"json": HELLO | {"temperature": 0}, "headers": ONLY_CACHED}, (504, "timeout_error")),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_refused(front, upstream, path: str, sent: dict, expected: tuple) -> None:
    assert await error(front, path, **sent) == expected
    assert upstream.asked == []


async def test_whoever_is_slow(upstream, tmp_path) -> None:
    late = {"data": b"x", "headers": {"Content-Length": "2"}}
    async with running(tmp_path, upstream, sections={"server": {"client_timeout_s": 1}}) as front:
        errors = await asyncio.gather(*(error(front, path, **late) for path in (MESSAGES, COUNT)))
    assert errors == [(408, "timeout_error")] * 2


@pytest.mark.parametrize("temperature", [0, 1], ids=["kept", "passed"])
@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/render"])
async def test_what_an_engine_fails_to_answer(front, upstream, path: str, temperature: int) -> None:
    async def cut(http: web.Request) -> web.StreamResponse:
        http.transport.abort()
        return web.Response()

    upstream.handler = cut
    request = HELLO | {"temperature": temperature}
    assert await error(front, path, json=request) == (502, "api_error")


async def test_whoever_asks_too_much_or_for_what_is_an_operators(front, upstream) -> None:
    async def message_of(_: web.Request) -> web.StreamResponse:
        return web.json_response(message())

    upstream.handler = message_of
    refusal = None
    # A minute later one more is answered.
    while refusal is None:
        async with front.session.post(MESSAGES, json=HELLO, headers=key("few")) as reply:
            refusal = None if reply.status == 200 else await error_in(reply)
    assert refusal == (429, "rate_limit_error")
    client = anthropic.AsyncAnthropic(
        base_url=front.url, api_key=KEYS["few"], auth_token=None, max_retries=0
    )

    async def ask_again_and_again() -> None:
        while True:
            await client.messages.create(**HELLO)

    async with client:
        with pytest.raises(anthropic.RateLimitError) as caught:
            await ask_again_and_again()
    assert caught.value.type == "rate_limit_error"
    assert int(caught.value.response.headers["Retry-After"]) > 0


async def test_a_stream_that_is_cut(front, upstream) -> None:
    async def cut(http: web.Request) -> web.StreamResponse:
        response = await stream(http, message_events().split(b"event: message_delta")[0])
        http.transport.abort()
        return response

    upstream.handler = cut
    request = HELLO | {"stream": True, "temperature": 0}
    async with front.session.post(MESSAGES, json=request) as reply:
        assert reply.status == 200
        name, data = (await reply.read()).strip().split(b"\n\n")[-1].split(b"\n")
    assert name == b"event: error"
    event = orjson.loads(data.removeprefix(b"data: "))
    message = "The engine ended before its answer was complete."
    assert event == {"type": "error", "error": {"type": "api_error", "message": message}}
    async with anthropic.AsyncAnthropic(
        base_url=front.url, api_key=KEYS["one"], auth_token=None, max_retries=0
    ) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            async with client.messages.stream(**HELLO, extra_body={"temperature": 0}) as events:
                await events.get_final_message()
    assert caught.value.type == "api_error"


async def test_elsewhere_errors_are_as_openai_has_them(front, upstream) -> None:
    for path in (CHAT, "/v1/responses", "/v1/messagesx"):
        async with front.session.post(path, json=HELLO, headers={"x-api-key": "x"}) as reply:
            assert reply.status == 401
            assert (await reply.json())["error"].keys() == {"message", "type", "param", "code"}


async def test_what_its_client_raises(front, upstream) -> None:
    unknown = HELLO | {"model": "no"}
    raised = [
        (KEYS["one"], unknown, {}, anthropic.NotFoundError, "not_found_error"),
        ("x", HELLO, {}, anthropic.AuthenticationError, "authentication_error"),
        (KEYS["one"], HELLO, {"cache": 1}, anthropic.BadRequestError, "invalid_request_error"),
    ]
    for api_key, asked, more, expected, kind in raised:
        async with anthropic.AsyncAnthropic(
            base_url=front.url, api_key=api_key, auth_token=None, max_retries=0
        ) as client:
            with pytest.raises(expected) as caught:
                await client.messages.create(**asked, extra_body=more)
            assert caught.value.type == kind
            counted = {name: value for name, value in asked.items() if name != "max_tokens"}
            with pytest.raises(expected) as caught:
                await client.messages.count_tokens(**counted, extra_body=more)
            assert caught.value.type == kind
    assert upstream.asked == []


async def test_without_an_engine_it_is_overloaded(own_upstream: Upstream, tmp_path) -> None:
    async with running(tmp_path, own_upstream) as front:
        await own_upstream.stop()
        await front.until_ready(503)
        for path in (MESSAGES, COUNT):
            assert await error(front, path, json=HELLO) == (503, "overloaded_error")
        async with anthropic.AsyncAnthropic(
            base_url=front.url, api_key="x", auth_token=None, max_retries=0
        ) as client:
            with pytest.raises(anthropic.InternalServerError) as caught:
                await client.messages.create(**HELLO)
        assert caught.value.type == "overloaded_error"
        assert caught.value.status_code == 503
