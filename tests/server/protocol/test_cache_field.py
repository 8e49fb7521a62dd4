"""What a request says in its body's field `cache`, in its parts and over sockets."""

from typing import Any

import orjson
import pytest
from aiohttp import web

from server.protocol.cache_control import NO_CACHE, CacheControl
from server.protocol.cache_field import parse_cache_field
from server.protocol.errors import BadRequestError
from tests.server.conftest import Front, Upstream, body, counting, question
from tiers.acceptance import Acceptance

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHANCE = {"temperature": 1}


NOTHING = (CacheControl(), False, None, None, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, NOTHING),
        ({}, NOTHING),
        ({"mode": None, "ttl": None, "tags": None, "variants": None}, NOTHING),
        ({"mode": "default"}, NOTHING),
        ({"mode": "use", "variants": 3}, (CacheControl(), True, None, None, 3)),
        ({"mode": "no-cache"}, (NO_CACHE, False, None, None, None)),
        ({"mode": "no-store"}, (CacheControl(no_store=True), False, None, None, None)),
        (
            {"mode": "only-if-cached"},
            (CacheControl(Acceptance(only_if_cached=True)), False, None, None, None),
        ),
        ({"ttl": 1.5, "tags": ["a", "b"]}, (CacheControl(), False, 1.5, ("a", "b"), None)),
    ],
)
async def test_parts(given: Any, expected: tuple[Any, ...]) -> None:
    field = parse_cache_field(given)
    assert (field.control, field.use, field.ttl_s, field.tags, field.variants) == expected


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ("no-cache", "cache", "should be an object"),
        ([], "cache", "should be an object"),
        ({"tll": 3}, "cache.tll", "isn't known; cache takes mode, tags, ttl, variants"),
        ({"mode": "off"}, "cache.mode", "one of default, use, no-cache"),
        ({"mode": {}}, "cache.mode", "one of default"),
        ({"ttl_s": 3}, "cache.ttl_s", "isn't known"),
        ({"b": 1, "a": 1, "ttl": 0}, "cache.a", "isn't known"),
        ({"x" * 200: 1}, f"cache.{'x' * 122}", "isn't known"),
        ({"ttl": 0}, "cache.ttl", "a number of seconds, more than 0"),
        ({"ttl": True}, "cache.ttl", "a number of seconds"),
        ({"ttl": "60"}, "cache.ttl", "a number of seconds"),
        ({"ttl": 1e300}, "cache.ttl", "a number of seconds"),
        ({"tags": "faq"}, "cache.tags", "a list of at most 16 texts"),
        ({"tags": ["a\n"]}, "cache.tags", "printable"),
        ({"tags": ["a", 1]}, "cache.tags", "a list of at most 16 texts"),
        ({"variants": 65}, "cache.variants", "an integer from 1 to 64"),
        ({"variants": 1.0}, "cache.variants", "an integer from 1 to 64"),
        ({"variants": True}, "cache.variants", "an integer from 1 to 64"),
    ],
)
async def test_mistakes_are_named(given: Any, param: str, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as raised:
        parse_cache_field(given)
    assert raised.value.param == param


async def test_variants_without_chance_to_choose_are_a_mistake(
    front: Front, upstream: Upstream
) -> None:
    for mode in (None, "default", "no-store", "no-cache"):
        async with front.post(question(cache={"mode": mode, "variants": 2})) as response:
            assert response.status == 400
            error = (await response.json())["error"]
            assert error["param"] == "cache.variants"
            assert "cache.mode should be use" in error["message"]
    assert upstream.asked == []


async def outcome_of(front: Front, asked: dict, **options: Any) -> tuple[str, str]:
    status, how, raw = await front.ask_alone(asked, **options)
    assert status == 200, raw
    text = orjson.loads(raw)["choices"][0]["message"]["content"]
    return "hit" if "; hit" in how else how.split("fwd=")[1], text


async def test_the_engine_does_not_see_the_field(front: Front, upstream: Upstream) -> None:
    async def echo(http: web.Request) -> web.StreamResponse:
        return web.json_response(body(str("cache" in await http.json())))

    upstream.handler = echo
    asked = question()
    assert await outcome_of(front, asked | {"cache": {"tags": ["a"]}}) == ("miss", "False")
    assert await outcome_of(front, asked) == ("hit", "False")
    assert await outcome_of(front, asked | {"cache": {"mode": "no-store"}}) == ("bypass", "False")


async def test_modes_say_what_cache_control_says(front: Front, upstream: Upstream) -> None:
    upstream.handler = counting()
    asked = question()
    refused = await front.ask(asked | {"cache": {"mode": "only-if-cached"}})
    assert refused[0] == 504
    assert await outcome_of(front, asked | {"cache": {"mode": "no-store"}}) == ("bypass", "0")
    assert await outcome_of(front, asked) == ("miss", "1")
    assert await outcome_of(front, asked | {"cache": {"mode": "no-cache"}}) == ("request", "2")
    assert await outcome_of(front, asked | {"cache": {"mode": "only-if-cached"}}) == ("hit", "2")
    headers = {"Cache-Control": "only-if-cached"}
    only = await front.ask(asked | {"cache": {"mode": "no-cache"}}, headers=headers)
    assert only[0] == 504


async def test_a_ttl_is_for_the_answer_that_the_request_makes(
    front: Front, upstream: Upstream
) -> None:
    asked = question(cache={"ttl": 10_000})
    await front.ask_alone(asked)
    _, how, _ = await front.ask_alone(asked)
    assert 8_000 <= int(how.split("ttl=")[1].split(";")[0]) <= 10_000
    _, how, _ = await front.ask_alone(question(cache={"ttl": 1e-6}))
    asked = question(cache={"ttl": 1e-6})
    await front.ask_alone(asked)
    assert (await front.ask_alone(asked))[1].startswith("tierserve; fwd=")


async def test_mistakes_are_a_clients(front: Front, upstream: Upstream) -> None:
    async with front.post(question(cache={"ttl": -1})) as response:
        error = (await response.json())["error"]
        assert response.status == 400
    assert error["param"] == "cache.ttl"
    assert error["message"] == "cache.ttl should be a number of seconds, more than 0"
    assert not upstream.asked


async def test_chance_is_kept_where_the_request_says_so(front: Front, upstream: Upstream) -> None:
    upstream.handler = counting()
    asked = question(**CHANCE)
    assert await outcome_of(front, asked) == ("bypass", "0")
    use = asked | {"cache": {"mode": "use"}}
    assert await outcome_of(front, use) == ("miss", "1")
    assert await outcome_of(front, use) == ("hit", "1")
    assert await outcome_of(front, asked) == ("bypass", "2")


async def test_variants_are_made_and_then_given_out_in_turn(
    front: Front, upstream: Upstream
) -> None:
    upstream.handler = counting()
    asked = question(**CHANCE, cache={"mode": "use", "variants": 3})
    made = [await outcome_of(front, asked) for _ in range(3)]
    assert made == [("miss", "0"), ("miss", "1"), ("miss", "2")]
    found = [await outcome_of(front, asked) for _ in range(6)]
    assert found == [("hit", str(number)) for number in (0, 1, 2, 0, 1, 2)]
    # One that asks for no chance has one answer.
    asked = question(cache={"mode": "use", "variants": 3})
    assert [(await outcome_of(front, asked))[0] for _ in range(3)] == ["miss", "hit", "hit"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_that_a_client_has_is_not_sent_again(
    front: Front, upstream: Upstream, streamed: bool
) -> None:
    asked = question(stream=streamed)
    await front.ask_alone(asked)
    async with front.post(asked) as response:
        tag, first = response.headers["ETag"], await response.read()
    async with front.post(asked) as response:
        assert response.headers["ETag"] == tag
        assert await response.read() != first
    for has in (tag, f'"other", {tag}', tag.removeprefix("W/"), "*"):
        async with front.post(asked, headers={"If-None-Match": has}) as response:
            assert response.status == 304
            assert await response.read() == b""
            assert response.headers["ETag"] == tag
            assert "; hit; " in response.headers["Cache-Status"]
            assert response.headers["X-Request-Id"]
            assert "Age" in response.headers
    async with front.post(asked, headers={"If-None-Match": '"other"'}) as response:
        assert response.status == 200
        assert await response.read()
    async with front.post(asked | {"stream": not streamed}) as response:
        assert response.headers["ETag"] != tag
