"""The prefix tier at the edge of a server: HTTP and the command `tierserve cache`."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest

from server.config.secrets import hash_key, new_key
from tests.server.conftest import Cache, Front, Upstream, question, running
from tests.server.handlers.test_purges import purges_of
from tests.server.prefix_blocks import held, held_in, opened, store_chain, stored
from tests.waiting import HANGS_S
from tiers.key import scope_named
from tiers.prefix_kv.index.index_file import INDEX

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = new_key()
ACME = scope_named(b"\0tenant\0acme")


@asynccontextmanager
async def with_prefixes(folder: Path, upstream: Upstream, **options) -> AsyncIterator[Front]:
    (folder / "tenants.json").write_bytes(
        orjson.dumps({"acme": {"keys": [hash_key(KEY)], "operator": True}})
    )
    options = {
        "prefix": {"path": str(folder / "prefix"), "max_bytes": "64MiB"},
        "sections": {"tenants": {"file": "tenants.json"}},
        "headers": {"Authorization": f"Bearer {KEY}"},
    } | options
    async with running(folder, upstream, **options) as front:
        yield front


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(HANGS_S):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_it_is_seen_purged_and_listed(tmp_path: Path, upstream: Upstream) -> None:
    async with with_prefixes(tmp_path, upstream) as front:
        # Beside the server's, as an engine has it.
        store = opened(tmp_path / "prefix")
        await until(lambda: is_metric(front, "tierserve_prefix_available", 1))
        # First, since one look at the store sees all that was written before the blocks it counts.
        store.index.save(
            {("m", name): 8 for name in ("queried_tokens", "loaded_tokens", "saved_seconds")}, {}
        )
        a = store_chain(store, "a", "model:m", f"tenant:{ACME}", requests=5)
        b = store_chain(store, "b", "model:n", f"tenant:{ACME}")
        await until(lambda: is_metric(front, "tierserve_prefix_blocks", 6))
        assert await front.metric('tierserve_prefix_loaded_tokens_total{model="m"}') == 8
        shown = await until_shown(front)
        assert (shown["blocks"], shown["loaded_tokens"], shown["saved_seconds"]) == (6, 8, 8)
        connector = aiohttp.UnixConnector(str(front.socket))
        async with aiohttp.ClientSession("http://admin", connector=connector) as admin:
            async with admin.get("/stats") as response:
                assert (await response.json())["prefix"]["counters"]["m"]["loaded_tokens"] == 8
            async with admin.get("/chains", params={"limit": 1}) as response:
                (chain,) = (await response.json())["chains"]
            assert (chain["blocks"], chain["labels"]) == (3, ["model:m", "tenant:acme"])
            for wrong in ({"limit": 0}, {"tier": "disk"}):
                async with admin.get("/chains", params=wrong) as response:
                    assert response.status == 400
            async with admin.post("/verify") as response:
                assert (await response.json())["prefix"] == {"blocks": 6, "damaged": 0}
            await until(lambda: is_purged(admin))
            # Once the purge has returned.
            assert (held(store, a), held(store, b)) == (0, 3)
        async with purges_of(front) as purges:
            await purges.purge("tenant:acme")
        await until(lambda: is_held(store, b, 0))
        store.close()


async def is_metric(front: Front, name: str, value: float) -> bool:
    return await front.metric(f"{name} ") == value


async def until_shown(front: Front) -> dict:
    """Return what the overview says of it, once that isn't from before a standstill."""
    while True:
        async with front.session.get("/overview") as response:
            shown = (await response.json())["prefix"]
        if shown["available"]:
            return shown


async def is_purged(admin: aiohttp.ClientSession) -> bool:
    """Purge the model `m`; return whether that was stored in time."""
    async with admin.post("/purge", json={"model": "m"}) as response:
        assert response.status == 200 or "takes too long" in await response.text()
        return response.status == 200


async def purged(cache: Cache, config: Path, *how: str) -> str:
    """Purge by the command, until that is stored in time; return what it says."""
    while (ended := await cache(config, "purge", *how)).status:
        assert "takes too long" in ended.err
    return ended.err


async def is_held(store, chain, number: int) -> bool:
    return held(store, chain) == number


async def test_commands_reach_it_with_and_without_a_server(
    cache: Cache, tmp_path: Path, upstream: Upstream
) -> None:
    folder = tmp_path / "prefix"
    async with with_prefixes(tmp_path, upstream) as front:
        await until(lambda: is_metric(front, "tierserve_prefix_available", 1))
        chains = stored(folder, {name: [f"model:{name}", f"tenant:{ACME}"] for name in "abc"})
        await until(lambda: is_metric(front, "tierserve_prefix_blocks", 9))
        for is_running in (True, False):
            if not is_running:
                front.process.send_signal(signal.SIGKILL)
                await front.process.wait()
            listed = await cache(front.config, "ls", "--tier", "prefix", "--json")
            assert (listed.status, len(listed.rows)) == (0, 3 if is_running else 2)
            status, out, _ = await cache(
                front.config, "ls", "--tier", "prefix", "--label", "model:c"
            )
            head, row = out.splitlines()
            assert row.endswith("model:c, tenant:acme")
            assert head.split()[-1] == "labels"
            status, out, _ = await cache(front.config, "stats")
            assert status == 0
            assert "\nblocks" in out
            status, out, _ = await cache(front.config, "verify")
            assert (status, out.splitlines()[-1]) == (0, "9 blocks of prefixes, 0 damaged")
            name = "a" if is_running else "b"
            assert "purged model:" in await purged(cache, front.config, "--model", name)
            assert held_in(folder, chains.pop(name)) == 0
        await purged(cache, front.config, "--tenant", "acme")
        assert held_in(folder, chains["c"]) == 0
    status, _, err = await cache(front.config, "ls", "--tier", "prefix", "--prefix", "a")
    assert (status, "are of entries" in err) == (2, True)


async def test_without_a_disk_tier_s_file_none_is_made(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "prefix"
    prefix = {"path": str(folder), "max_bytes": "64MiB"}
    front = Front(tmp_path, {"m": {"upstreams": ["http://127.0.0.1:1"]}}, prefix=prefix)
    status, _, err = await cache(front.config, "purge", "--model", "m")
    assert (status, "no disk tier's file" in err) == (1, True)
    chains = stored(folder, {"a": ["model:m"]})
    await purged(cache, front.config, "--model", "m")
    assert held_in(folder, chains["a"]) == 0
    assert (await cache(front.config, "verify")).out == "3 blocks of prefixes, 0 damaged\n"
    assert not (tmp_path / "disk").exists()


async def test_what_is_not_configured_says_so(cache: Cache, front: Front) -> None:
    status, _, err = await cache(front.config, "ls", "--tier", "prefix")
    assert (status, "There is no prefix tier." in err) == (1, True)
    assert await front.metric("tierserve_prefix") == 0


async def test_a_folder_that_can_not_be_used_fails_nothing_else(
    cache: Cache, tmp_path: Path, upstream: Upstream
) -> None:
    (tmp_path / "prefix" / INDEX).mkdir(parents=True)
    async with with_prefixes(tmp_path, upstream) as front:
        asked = question()
        assert (await front.ask(asked))[0] == 200
        assert "hit" in (await front.ask_alone(asked))[1]
        assert await is_metric(front, "tierserve_prefix_available", 0)
        await front.until_logged("the prefix tier in")
        status, _, err = await cache(front.config, "purge", "--all", "--yes")
        assert (status, "the prefix tier could not store the purge" in err) == (1, True)
        # The answers are purged nevertheless.
        assert "fwd=miss" in (await front.ask(asked))[1]
        (tmp_path / "prefix" / INDEX).rmdir()
        await until(lambda: is_metric(front, "tierserve_prefix_available", 1))
        await purged(cache, front.config, "--all", "--yes")
    assert front.process.returncode == 0
    assert front.log.read_text().count("can't be used") == 1
