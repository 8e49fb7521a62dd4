"""The warm start: which prefixes an engine gets, and that clients go first."""

import asyncio
import hashlib
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from server.engine.routing.addresses import Addresses
from server.engine.routing.upstreams import Upstreams
from server.engine.turns import Turns
from server.engine.upstream import Upstream
from server.engine.warm_start import WarmStart
from tests.waiting import HANGS_S
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.options import DISK_TOKENS, WARM
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.prefix_kv.scope import adapted
from tiers.prefix_kv.store import MIN_BYTES, PrefixStore, StoreConfig

BLOCK_TOKENS, BLOCK_BYTES = 4, 512
SCOPE = b"s" * 16


def chain(
    *tokens: int, scope: bytes = SCOPE, adapter: str = "", salt: str = "", is_plain: bool = True
) -> BlockChain:
    """Return a chain of one block for each token, which stands four times in it."""
    names, parent = [], b""
    for token in tokens:
        content = array("I", [token] * BLOCK_TOKENS).tobytes()
        own = hashlib.sha256(parent + content + salt.encode()).digest()
        names.append(BlockName(own, parent, content))
        parent = own
    return BlockChain(scope, names, (), adapter, salt, is_plain)


class Engine:
    """An upstream that notes what it is asked, and says that it loaded all."""

    def __init__(self, store: PrefixStore) -> None:
        self.store = store
        self.asked: list[dict] = []
        self.loads = True
        self.got = asyncio.Event()

    async def answer(self, http: web.Request) -> web.Response:
        if http.path == "/v1/models":
            return web.json_response({})
        self.asked.append(await http.json())
        self.got.set()
        loaded = len(self.asked[-1]["prompt"]) - 1
        return web.json_response(
            {"kv_transfer_params": {DISK_TOKENS: loaded} if self.loads else None}
        )

    def keep(self, stored: BlockChain, requests: int) -> None:
        block = memoryview(bytearray(BLOCK_BYTES))
        blocks = [
            (NewBlock(stored, at, BLOCK_BYTES, requests, 0), block)
            for at in range(len(stored.names))
        ]
        self.store.write(blocks, memoryview(bytearray(BLOCK_BYTES + 64)))

    def describe(self, blocks: int, scope: bytes = SCOPE, **more: object) -> None:
        facts = {
            "model": "small", "rank": 0, "opened_at": 1, "kv_blocks": blocks,
            "block_tokens": BLOCK_TOKENS,
        }  # fmt: skip
        self.store.index.describe_scope(scope, json.dumps(facts | more).encode())

    @property
    def prompts(self) -> list[list[int]]:
        """The first token of each block of each prompt that was asked."""
        return [asked["prompt"][:-1:BLOCK_TOKENS] for asked in self.asked]


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    store = PrefixStore(StoreConfig(tmp_path / "prefix", MIN_BYTES))
    yield Engine(store)
    store.close()


@pytest_asyncio.fixture
async def upstreams(engine: Engine) -> AsyncIterator[Upstreams]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine.answer)
    async with TestServer(app) as server:
        made = Upstreams(
            Addresses([str(server.make_url(""))]),
            lambda address: Upstream(address.url, timeout_s=HANGS_S),
            max_requests=4,
            turns=Turns(),
        )
        yield made
        await made.close()


def warm_start(
    engine: Engine, upstreams: Upstreams, *, share: float = 0.5, min_tokens: int = 4
) -> WarmStart:
    return WarmStart(
        lambda: nullcontext(engine.store.index), "small", lambda: {"poet": "f"}, upstreams,
        share=share, min_tokens=min_tokens,
    )  # fmt: skip


async def warmed(warm: WarmStart, upstreams: Upstreams) -> None:
    """Have the engine warmed once."""
    upstreams.all[0].mark_started()
    upstreams.all[0].ready = True
    await warm._warm(upstreams.all[0].ready_since)


async def test_each_prefix_is_sent_once_and_the_hottest_first(
    engine: Engine, upstreams: Upstreams
) -> None:
    engine.describe(100)
    engine.keep(chain(1, 2), 3)
    engine.keep(chain(1, 2, 3), 3)
    engine.keep(chain(1, 2, 4), 2)
    engine.keep(chain(9), 5)
    await warmed(warm_start(engine, upstreams), upstreams)
    assert engine.prompts == [[9], [1, 2, 3], [1, 2, 4]]
    first = engine.asked[0]
    assert first["prompt"] == [9, 9, 9, 9, 9]
    assert (first["model"], first["max_tokens"]) == ("small", 1)
    assert first["kv_transfer_params"] == WARM
    assert "cache_salt" not in first


async def test_only_the_share_is_filled(engine: Engine, upstreams: Upstreams) -> None:
    engine.describe(4)
    engine.keep(chain(1, 2, 3), 3)
    engine.keep(chain(9), 5)
    await warmed(warm_start(engine, upstreams), upstreams)
    assert engine.prompts == [[9], [1]]


async def test_short_prefixes_and_those_of_media_are_left_out(
    engine: Engine, upstreams: Upstreams
) -> None:
    engine.describe(100)
    engine.keep(chain(1, 2), 3)
    engine.keep(chain(9), 5)
    engine.keep(chain(7, 8, is_plain=False), 5)
    await warmed(warm_start(engine, upstreams, min_tokens=8), upstreams)
    assert engine.prompts == [[1, 2]]


async def test_adapters_and_salts_come_with_their_prefixes(
    engine: Engine, upstreams: Upstreams
) -> None:
    engine.describe(100)
    engine.keep(chain(1, 2, salt="scope.a"), 3)
    engine.keep(chain(5, scope=adapted(SCOPE, "f"), adapter="poet"), 2)
    engine.keep(chain(6, scope=adapted(SCOPE, "another version of poet"), adapter="poet"), 2)
    await warmed(warm_start(engine, upstreams), upstreams)
    assert [(asked["model"], asked.get("cache_salt")) for asked in engine.asked] == [
        ("small", "scope.a"),
        ("poet", None),
    ]
    assert engine.prompts == [[1, 2], [5]]


async def test_only_the_newest_scope_of_the_model_counts(
    engine: Engine, upstreams: Upstreams
) -> None:
    engine.describe(100, b"o" * 16)
    engine.describe(100, opened_at=2)
    engine.describe(100, b"x" * 16, opened_at=3, model="large")
    engine.keep(chain(1, scope=b"o" * 16), 3)
    engine.keep(chain(2), 3)
    engine.keep(chain(3, scope=b"x" * 16), 3)
    await warmed(warm_start(engine, upstreams), upstreams)
    assert engine.prompts == [[2]]


async def test_nothing_is_sent_before_an_engine_has_used_the_store(
    engine: Engine, upstreams: Upstreams
) -> None:
    await warmed(warm_start(engine, upstreams), upstreams)
    assert engine.asked == []


async def test_requests_of_clients_go_first(engine: Engine, upstreams: Upstreams) -> None:
    engine.describe(100)
    engine.keep(chain(1), 3)
    upstreams.all[0].mark_started()
    upstreams.all[0].ready = True
    client = upstreams.request("GET", "/v1/models", data=None, headers={})
    async with client:
        warming = asyncio.create_task(warmed(warm_start(engine, upstreams), upstreams))
        # It looks every twentieth of a second, so it has looked by then.
        await asyncio.sleep(0.2)
        assert engine.asked == []
    await warming
    assert engine.prompts == [[1]]


async def test_an_engine_that_loads_nothing_is_left_alone(
    engine: Engine, upstreams: Upstreams
) -> None:
    engine.describe(100)
    engine.loads = False
    for token in range(6):
        engine.keep(chain(token), 3)
    await warmed(warm_start(engine, upstreams), upstreams)
    assert len(engine.asked) == 3


async def test_every_start_is_warmed(engine: Engine, upstreams: Upstreams) -> None:
    engine.describe(100)
    engine.keep(chain(1), 3)
    (upstream,) = upstreams.all
    running = asyncio.create_task(warm_start(engine, upstreams).run())
    for _ in range(2):
        engine.got.clear()
        upstream.mark_started()
        upstream.ready = True
        await asyncio.wait_for(engine.got.wait(), HANGS_S)
        upstream.mark_stopped()
    assert engine.prompts == [[1], [1]]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_store_that_fails_is_no_failure_of_the_server(
    engine: Engine, upstreams: Upstreams, caplog: pytest.LogCaptureFixture
) -> None:
    engine.store.index.describe_scope(SCOPE, orjson.dumps({"model": "small", "rank": 0})[:-3])
    (upstream,) = upstreams.all
    running = asyncio.create_task(warm_start(engine, upstreams).run())
    upstream.mark_started()
    upstream.ready = True
    async with asyncio.timeout(HANGS_S):
        while "isn't warmed" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
