"""The most frequent prefixes of prompts: what is counted, and who may read it."""

import asyncio
import json
import time

import aiohttp
import orjson
import pytest
import yaml
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from server.auth.tenant import Tenant, open_tenant
from server.config.secrets import hash_key, new_key
from server.protocol.errors import BadRequestError
from server.protocol.model_names import ModelNames
from server.protocol.request import parse_request
from server.telemetry.prefixes import Prefixes
from tests.server.conftest import (
    CHAT,
    WHOLE,
    body,
    chunk,
    of_vllm,
    question,
    running,
    stream,
)
from tests.servers import free_port
from tests.waiting import HANGS_S

NAMES = ModelNames({"m": of_vllm("m", "of m"), "n": of_vllm("n", "of n")})
SYSTEM = {"role": "system", "content": "You are a patient support bot. " * 8}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
DAY_S = 86400


class Counting:
    """What a server does with the beginnings of what it is asked."""

    def __init__(self) -> None:
        self.now = 1e9
        self.prefixes = Prefixes(lambda: self.now)

    def ask(self, asked: dict, counts: bytes = b"", path: str = CHAT, tenant: str = "acme") -> None:
        of = Tenant(tenant, tenant.encode(), salt=f"of {tenant}")
        self.prefixes.note(parse_request(path, orjson.dumps(asked), of, NAMES), counts)

    def rows(self) -> list[dict]:
        return self.prefixes.report()["prefixes"]


def chat(*messages: dict | str, **more) -> dict:
    listed = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return {"model": "m", "messages": listed} | more


def usage(prompt: int, reused: int | None = None) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": 1}
    if reused is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": reused}
    return orjson.dumps({"usage": counts})


def test_what_several_prompts_begin_with_is_told() -> None:
    counting = Counting()
    for number in range(5):
        counting.ask(chat(SYSTEM, f"Question {number}?"))
    counting.ask(chat("Something else?"))
    (row,) = counting.rows()
    text = f"system: {SYSTEM['content']}\n"
    assert (row["model"], row["tenant"], row["requests"]) == ("m", "acme", 5)
    assert row["characters"] == len(text)
    assert row["preview"] == f"{text[:100]}…{text[-60:]}"
    assert row["asked_at"] == counting.now
    assert (row["tokens"], row["reused_tokens"], row["reused_ratio"]) == (None, None, None)


def test_what_vllm_drops_is_no_part_of_a_beginning() -> None:
    counting = Counting()
    for number in range(3):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cch={number};"}
        system = [header, {"type": "text", "text": "Help."}]
        marked = {"type": "text", "text": "One?", "cache_control": {"type": "ephemeral"}}
        asked = chat({"role": "user", "content": [marked]}, "Two?"[:number], system=system)
        counting.ask(asked, path="/v1/messages")
    assert [(row["requests"], row["preview"].count("x-anthropic")) for row in counting.rows()] == [
        (3, 0)
    ]


def test_a_longer_beginning_is_told_in_place_of_one_that_says_no_more() -> None:
    counting = Counting()
    turns = [SYSTEM, "One?", {"role": "assistant", "content": "Yes."}, "Two?"]
    for _ in range(2):
        counting.ask(chat(*turns[:2], temperature=1))
        counting.ask(chat(*turns, temperature=1))
    # Asked for by all, and by half.
    assert [(each["requests"], each["preview"][-7:]) for each in counting.rows()] == [
        (4, "r: One?"[-6:] + "\n"),
        (2, "r: Two?"[-6:] + "\n"),
    ]


def test_a_long_text_may_go_on_otherwise() -> None:
    counting = Counting()
    shots = "Q: What is one and one? A: Two.\n" * 200
    for number in range(3):
        counting.ask({"model": "m", "prompt": f"{shots}{number}"}, path="/v1/completions")
    (row,) = counting.rows()
    assert (row["requests"], row["characters"]) == (3, 4096)
    assert row["preview"] == f"{shots[:100]}…{shots[4036:4096]}"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", lambda n: chat(SYSTEM, n, tools=TOOLS)),
        ("/v1/completions", lambda n: {"prompt": SYSTEM["content"] * 8 + n}),
        ("/v1/completions", lambda n: {"prompt": [SYSTEM["content"] * 8 + n, "other"]}),
        ("/v1/completions", lambda n: {"prompt": [7] * 1000 + [int(n)]}),
        ("/v1/responses", lambda n: {"instructions": SYSTEM["content"], "input": n}),
        ("/v1/responses", lambda n: {"input": [SYSTEM, {"role": "user", "content": n}]}),
        ("/v1/messages", lambda n: chat(n, system=SYSTEM["content"], tools=TOOLS)),
        ("/v1/messages", lambda n: chat(n, system=[{"type": "text", "text": "Be brief."}])),
        ("/v1/chat/completions", lambda n: chat({"role": "system", "content": [{"type": "text",
                                                 "text": "Be brief."}]}, n)),
    ],
)  # fmt: skip
def test_of_each_route_that_generates(path: str, fields) -> None:
    counting = Counting()
    for number in range(3):
        counting.ask({"model": "m"} | fields(str(number)), path=path)
    (row,) = counting.rows()
    assert row["requests"] == 3
    assert "function" not in row["preview"]


def test_what_generates_nothing_is_not_counted() -> None:
    counting = Counting()
    for _ in range(3):
        counting.ask({"model": "m", "input": "x"}, path="/v1/embeddings")
        counting.ask({"model": "m", "prompt": "x"}, path="/tokenize")
        counting.ask({"model": "m"}, path="/v1/completions")
        counting.ask({"model": "m", "messages": 7})
    assert counting.rows() == []


def test_what_engines_keep_apart_is_apart() -> None:
    counting = Counting()
    ways = [
        {},
        {"tenant": "globex"},
        {"more": {"model": "n"}},
        {"more": {"cache_salt": "mine"}},
        {"more": {"tools": TOOLS}},
    ]
    for number, way in enumerate(ways):
        for question_ in "ab":
            asked = chat(SYSTEM, f"{number}{question_}") | way.get("more", {})
            counting.ask(asked, tenant=way.get("tenant", "acme"))
    rows = counting.rows()
    assert [each["requests"] for each in rows] == [2] * len(ways)
    assert sorted((each["model"], each["tenant"]) for each in rows) == [
        ("m", "acme"), ("m", "acme"), ("m", "acme"), ("m", "globex"), ("n", "acme")
    ]  # fmt: skip


def test_what_the_engine_reuses_is_told() -> None:
    counting = Counting()
    # The system prompt is nine tenths of these.
    system = {"role": "system", "content": "x" * 891}
    asked = [chat(system, f"{'y' * 92}{number}") for number in range(3)]
    counting.ask(asked[0], usage(100, 0))
    counting.ask(asked[1], usage(100, 80))
    # One without the counts changes nothing for the others.
    counting.ask(asked[2], usage(100))
    (row,) = counting.rows()
    assert (row["characters"], row["tokens"]) == (900, 90)
    assert row["reused_tokens"] == 80
    assert row["reused_ratio"] == pytest.approx(80 / 180, abs=1e-4)
    # More than it has can't be its own.
    counting.ask(asked[1], usage(100, 96))
    assert counting.rows()[0]["reused_tokens"] == 170


def test_of_a_long_conversation_each_beginning_has_its_part_of_the_tokens() -> None:
    counting = Counting()
    system = {"role": "system", "content": "x" * 891}
    for number in range(2):
        # 21 parts, of 100 characters but for the first.
        turns = [f"{number}{turn:02}{'y' * 90}" for turn in range(20)]
        counting.ask(chat(system, *turns), usage(290, 90 * number))
    (row,) = counting.rows()
    assert (row["characters"], row["tokens"]) == (900, 90)
    assert row["reused_ratio"] == 0.5


def test_yesterdays_count_half() -> None:
    counting = Counting()
    for number in range(8):
        counting.ask(chat(SYSTEM, str(number)), usage(100, 50))
    counting.now += DAY_S
    (row,) = counting.rows()
    assert (row["requests"], row["reused_tokens"]) == (4, 200)
    counting.ask(chat(SYSTEM, "new"))
    assert counting.rows()[0]["requests"] == 5
    counting.now += 1000 * DAY_S
    assert counting.rows() == []


def test_few_of_many_are_found_in_little_memory() -> None:
    counting = Counting()
    for number in range(4000):
        counting.ask(chat(f"Alone {number}."))
        if number % 20 == 0:
            counting.ask(chat(SYSTEM, f"Question {number}?"))
    rows = counting.rows()
    assert len(rows) == 1
    assert 190 < rows[0]["requests"] <= 200


def test_a_large_body_is_not_looked_at_to_its_end() -> None:
    counting = Counting()
    long = [SYSTEM, *({"role": "user", "content": "é" * 5000} for _ in range(40))]
    for number, tools in ((0, TOOLS), (1, TOOLS), (2, []), (3, [])):
        # Clients write tools after the messages, where they aren't looked at with the rest.
        counting.ask(chat(*long, str(number), tools=tools), usage(100_000, 90_000))
    rows = counting.rows()
    assert [each["requests"] for each in rows] == [2, 2]
    assert {each["reused_ratio"] for each in rows} == {1.0}
    assert all(10_000 < each["characters"] < 33_000 for each in rows)


texts = st.text('aé😀"\\{ \n\ud800', max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
messages = st.fixed_dictionaries(
    {}, optional={"role": texts | values, "content": texts | values, "name": texts}
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(messages | values, max_size=12) | values,
        "prompt": values,
        "input": values,
        "system": values,
        "instructions": values,
        "tools": values,
        "cache_salt": values,
    },
)


@given(bodies, st.sampled_from([CHAT, "/v1/completions", "/v1/responses", "/v1/messages"]))
def test_no_request_is_too_odd(asked: dict, path: str) -> None:
    raw = json.dumps(asked | {"model": "m"}).encode()
    try:
        request = parse_request(path, raw, open_tenant(""), NAMES)
    except BadRequestError:
        # A lone surrogate.
        return
    prefixes = Prefixes(lambda: 0)
    for _ in range(2):
        prefixes.note(request, b"")
    rows = prefixes.report()["prefixes"]
    assert len(rows) <= 1
    assert all(len(each["preview"]) <= 161 for each in rows)


@given(st.text('aé😀"\\\n\x01', min_size=1, max_size=20), st.integers(0, 12))
def test_a_large_body_may_be_cut_anywhere(text: str, more: int) -> None:
    prefixes = Prefixes(lambda: 0)
    padding = "x" * (32 * 1024 - 120 + more)
    for end in "ab":
        asked = orjson.dumps(chat(SYSTEM, padding[: -len(text) or None] + text * 20, end))
        prefixes.note(parse_request(CHAT, asked, open_tenant(""), NAMES), b"")
    (row,) = prefixes.report()["prefixes"]
    assert (row["requests"], row["characters"]) == (2, 16384)


KEYS = {name: new_key() for name in ("acme", "ops")}
ADMIN_KEY = new_key()
NO_STORE = {"Cache-Control": "no-store"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def until_the_day_is_long() -> None:
    """Wait for midnight, where it is near: a server halves its counts then."""
    if (left_s := -time.time() % DAY_S) < HANGS_S:
        await asyncio.sleep(left_s + 1)


async def counting_engine(http: web.Request) -> web.StreamResponse:
    """An engine that reports what it reused."""
    asked = orjson.loads(await http.read())
    counts = {"usage": {"prompt_tokens": 200, "prompt_tokens_details": {"cached_tokens": 64}}}
    if not asked.get("stream"):
        return web.json_response(body() | counts)
    last = b"data: " + orjson.dumps(orjson.loads(chunk(None)[6:]) | counts) + b"\n\n"
    return await stream(http, *WHOLE[:3], last, WHOLE[4])


@pytest.mark.asyncio(loop_scope="module")
async def test_an_administrator_sees_what_engines_were_asked(upstream, tmp_path) -> None:
    await until_the_day_is_long()
    upstream.handler = counting_engine
    given_ = {
        name: {"keys": [hash_key(key)], "operator": name == "ops"} for name, key in KEYS.items()
    }
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump(given_))
    port = free_port()
    sections = {
        "tenants": {"file": "tenants.yaml"},
        "admin": {"port": port, "key": ADMIN_KEY},
    }
    first, second, third, fourth = (
        question(messages=[SYSTEM, {"role": "user", "content": f"Secret {number}?"}])
        for number in range(4)
    )
    async with running(tmp_path, upstream, sections=sections) as front:
        acme = bearer(KEYS["acme"])
        # A miss, a hit, a stream, one past the tiers in either form, and one that fails.
        for asked in (
            first,
            first,
            second | {"stream": True},
            third | {"temperature": 1},
            fourth | {"temperature": 1, "stream": True, "stream_options": {"include_usage": True}},
        ):
            async with front.post(asked, headers=acme) as reply:
                assert reply.status == 200
                await reply.read()

        async def refused(_: web.Request) -> web.StreamResponse:
            return web.json_response({"error": {}}, status=400)

        secret = question(messages=[{"role": "user", "content": "Not to be stored."}])
        for more in ({}, {"temperature": 1}) * 2:
            async with front.post(secret | more, headers=acme | NO_STORE) as reply:
                assert reply.status == 200
                await reply.read()
        upstream.handler = refused
        for more in ({}, {"temperature": 1}):
            asked = question(messages=[SYSTEM, {"role": "user", "content": "No."}])
            async with front.post(asked | more, headers=acme) as reply:
                assert reply.status == 400
                await reply.read()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            row = {"requests": 0}
            async with asyncio.timeout(HANGS_S):
                # Noted once an answer is stored.
                while row["requests"] < 4:
                    async with session.get("/prefixes", headers=bearer(ADMIN_KEY)) as reply:
                        (row,) = (await reply.json())["prefixes"]
            async with session.get("/prefixes", headers=acme) as reply:
                assert reply.status == 401
        assert (row["model"], row["tenant"], row["requests"]) == ("m", "acme", 4)
        assert row["preview"].startswith("system: You are a patient")
        assert row["tokens"] > 150
        assert row["reused_tokens"] == 4 * 64
        for path in ("/prefixes", "/overview", "/metrics"):
            async with front.session.get(path, headers=bearer(KEYS["ops"])) as reply:
                assert b"patient" not in await reply.read()
        assert "patient" not in front.log.read_text()
