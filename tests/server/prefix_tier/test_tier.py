"""The prefix tier's store in the server: purges that reach it, damage, and what it reports."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.auth.tenants import Tenants
from server.config.schema import TenantsConfig
from server.config.secrets import hash_key
from server.prefix_tier import tier as tier_module
from server.prefix_tier.collector import PrefixCollector
from server.prefix_tier.labels import PrefixLabels
from server.prefix_tier.tier import PrefixTier, PrefixTierError
from tests.server.prefix_blocks import BLOCK_BYTES, TOKENS, held, opened, store_chain
from tests.tiers.child import Child
from tests.tiers.prefix_kv.test_folder import join, join_for_ever
from tests.waiting import HANGS_S
from tiers import Purges
from tiers.key import scope_named
from tiers.prefix_kv.folder import MAX_DEATHS
from tiers.prefix_kv.index.index_file import INDEX
from tiers.prefix_kv.store import MIN_BYTES, Location, PrefixStore, StoreConfig
from tiers.purges.table import PurgeTable

ACME, PARTNERS = scope_named(b"\0tenant\0acme"), scope_named(b"\0scope\0partners")


@pytest.fixture(autouse=True)
def _patient(monkeypatch) -> None:
    """Let the disk take its time."""
    for name in ("_PURGE_S", "_STALE_S"):
        monkeypatch.setattr(tier_module, name, HANGS_S)


def tenants_of(folder: Path, *, cache_salt: bool = True, **scopes: str | None) -> Tenants:
    """Return tenants with these scopes; without any, everybody who can connect may ask."""
    if not scopes:
        return Tenants(TenantsConfig(cache_salt=cache_salt))
    file = folder / "tenants.yaml"
    lines = [
        f"{name}: {{keys: ['{hash_key(name)}']{f', scope: {scope}' if scope else ''}}}"
        for name, scope in scopes.items()
    ]
    file.write_text("\n".join(lines))
    return Tenants(TenantsConfig(file=file, cache_salt=cache_salt))


@asynccontextmanager
async def tier_of(
    folder: Path,
    tenants: Tenants,
    purges: Purges | None = None,
    open_store: Callable[[StoreConfig], PrefixStore] = PrefixStore,
) -> AsyncIterator[PrefixTier]:
    config = StoreConfig(folder / "prefix", MIN_BYTES)
    purges = Purges() if purges is None else purges
    tier = PrefixTier(config, purges, PrefixLabels(tenants), open_store=open_store)
    await tier.refresh()
    try:
        yield tier
    finally:
        await tier.close()


def written(folder: Path, *chains: tuple[str, ...]) -> None:
    """Store chains, each a name with labels, and close the store again."""
    store = opened(folder / "prefix")
    for name, *labels in chains:
        store_chain(store, name, *labels)
    store.close()


def found(folder: Path) -> dict[str, int]:
    """Return how many blocks of the chains a, b and c an engine that starts now would find."""
    from tests.server.prefix_blocks import chain_of

    store = opened(folder / "prefix")
    counts = {name: held(store, chain_of(name)) for name in "abc"}
    store.close()
    return counts


ALL_LABELS = (
    ("a", "model:m", f"tenant:{ACME}"),
    ("b", "model:m", "model:poet", f"tenant:{PARTNERS}"),
    ("c", "model:n", "tenant:gone"),
)


@pytest.mark.parametrize(
    ("label", "left"),
    [
        ("all", {"a": 0, "b": 0, "c": 0}),
        ("model:m", {"a": 0, "b": 0, "c": 3}),
        ("model:poet", {"a": 3, "b": 0, "c": 3}),
        ("tenant:acme", {"a": 0, "b": 3, "c": 3}),
        # It shares what `partners` have, and once may have had a scope of its own.
        ("tenant:east", {"a": 3, "b": 0, "c": 3}),
        ("tenant:nobody", {"a": 3, "b": 3, "c": 3}),
        ("tag:faq", {"a": 3, "b": 3, "c": 3}),
        ("key:" + 64 * "a", {"a": 3, "b": 3, "c": 3}),
    ],
)
@pytest.mark.parametrize("how", ["asked of this process", "of another"])
async def test_purges_reach_the_blocks_that_they_mean(
    tmp_path: Path, label: str, left: dict[str, int], how: str
) -> None:
    written(tmp_path, *ALL_LABELS)
    tenants = tenants_of(tmp_path, acme=None, east="partners")
    purges = Purges()
    async with tier_of(tmp_path, tenants, purges) as tier:
        if how == "of another":
            await purges.purge(label)
            await tier.refresh()
        else:
            await tier.purge([label])
    assert found(tmp_path) == left


async def test_a_tenant_that_is_gone_is_purged_by_the_scope_that_it_had(tmp_path: Path) -> None:
    written(tmp_path, *ALL_LABELS)
    async with tier_of(tmp_path, tenants_of(tmp_path, other=None)) as tier:
        await tier.purge(["tenant:acme"])
    assert found(tmp_path) == {"a": 0, "b": 3, "c": 3}


@pytest.mark.parametrize("options", [{}, {"cache_salt": False, "acme": None}])
async def test_where_no_salt_tells_tenants_apart_a_tenant_s_purge_is_of_all(
    tmp_path: Path, options: dict
) -> None:
    written(tmp_path, ("a", "model:m"))
    async with tier_of(tmp_path, tenants_of(tmp_path, **options)) as tier:
        await tier.purge(["tag:other"])
        assert tier.report.blocks == 3
        await tier.purge(["tenant:anonymous"])
    assert found(tmp_path)["a"] == 0


async def test_a_purge_holds_whatever_the_clocks_say(tmp_path: Path) -> None:
    """Blocks that know a purge of the future are purged by one of now, asked of this process."""
    store = opened(tmp_path / "prefix")
    store.index.merge_purges(PurgeTable().with_purge(2**61, "model:other"))
    store_chain(store, "a", "model:m")
    store.close()
    async with tier_of(tmp_path, tenants_of(tmp_path)) as tier:
        await tier.purge(["model:m"])
    assert found(tmp_path)["a"] == 0


async def test_purges_of_before_the_store_was_open_are_written_once_it_is(tmp_path: Path) -> None:
    written(tmp_path, ("a", "model:m"), ("b", "model:n"))
    fails, purges = True, Purges()

    def open_store(config: StoreConfig) -> PrefixStore:
        if fails:
            raise OSError("the disk has gone")
        return PrefixStore(config)

    async with tier_of(tmp_path, tenants_of(tmp_path), purges, open_store) as tier:
        with pytest.raises(PrefixTierError, match="the disk has gone"):
            await tier.purge(["model:m"])
        assert not tier.report.available
        fails = False
        await tier.refresh()
        assert tier.report.available
    assert found(tmp_path) == {"a": 0, "b": 3, "c": 0}


async def test_a_purge_waits_no_longer_than_it_may(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tier_module, "_PURGE_S", 0.01)
    written(tmp_path, ("a", "model:m"))
    goes_on = threading.Event()

    def open_store(config: StoreConfig) -> PrefixStore:
        goes_on.wait()
        return PrefixStore(config)

    tier = PrefixTier(
        StoreConfig(tmp_path / "prefix", MIN_BYTES), Purges(),
        PrefixLabels(tenants_of(tmp_path)), open_store=open_store,
    )  # fmt: skip
    with pytest.raises(PrefixTierError, match="takes too long"):
        await tier.purge(["model:m"])
    goes_on.set()
    await tier.close()
    # It was only late.
    assert found(tmp_path)["a"] == 0


@pytest.mark.parametrize("ended_engines", [True, False])
async def test_engines_that_the_server_ended_are_no_deaths(
    tmp_path: Path, ended_engines: bool
) -> None:
    for _ in range(MAX_DEATHS):
        tier = PrefixTier(
            StoreConfig(tmp_path / "prefix", MIN_BYTES),
            Purges(),
            PrefixLabels(tenants_of(tmp_path)),
        )
        await tier.refresh()
        with Child(join_for_ever, tmp_path / "prefix") as engine:
            engine.connection.recv()
        await tier.close(ended_engines=ended_engines)
    folder = join(tmp_path / "prefix")
    assert folder.may_kill != ended_engines
    folder.leave()


async def test_a_store_that_took_the_place_of_another_is_opened(tmp_path: Path) -> None:
    written(tmp_path, ("a", "model:m"))
    async with tier_of(tmp_path, tenants_of(tmp_path)) as tier:
        assert tier.report.blocks == 3
        folder = tmp_path / "prefix"
        for file in list(folder.iterdir()):
            file.rename(tmp_path / file.name)
        await tier.refresh()
        # Engines may go on with what has lost its name.
        assert tier.report.blocks == 3
        written(tmp_path, ("a", "model:m"), ("b", "model:m"))
        await tier.refresh()
        assert tier.report.blocks == 6
        await tier.purge(["model:m"])
    assert found(tmp_path)["b"] == 0


@pytest.mark.parametrize("damage", ["a file in its place", "not LMDB's", "encrypted"])
async def test_what_can_not_be_read_is_reported_and_logged_once(
    tmp_path: Path, damage: str, caplog
) -> None:
    folder = tmp_path / "prefix"
    if damage == "a file in its place":
        folder.touch()
    elif damage == "not LMDB's":
        folder.mkdir()
        (folder / INDEX).mkdir()
    else:
        store = opened(folder, b"k" * 32)
        store.close()
    async with tier_of(tmp_path, tenants_of(tmp_path)) as tier:
        for _ in range(3):
            await tier.refresh()
        assert (tier.report.available, tier.report.blocks) == (False, 0)
        families = {
            family.name: family for family in PrefixCollector(lambda: tier.report, ["m"]).collect()
        }
        assert families["tierserve_prefix_available"].samples[0].value == 0
        assert caplog.text.count("can't be used") == 1
        with pytest.raises(PrefixTierError):
            await tier.purge(["all"])


async def test_a_store_that_was_cut_short_is_begun_anew_and_still_purged(tmp_path: Path) -> None:
    written(tmp_path, ("a", "model:m"))
    async with tier_of(tmp_path, tenants_of(tmp_path)) as tier:
        os.truncate(tmp_path / "prefix" / INDEX, 4096)
        await tier.purge(["model:m"])
        assert (tier.report.available, tier.report.blocks) == (True, 0)


async def test_counters_stay_while_the_store_can_not_be_read(tmp_path: Path) -> None:
    store = opened(tmp_path / "prefix")
    store.index.save({("m", "loaded_tokens"): 7, ("n", "loaded_tokens"): 2, ("m", "hits"): 1}, {})
    store.close()
    opens = iter([PrefixStore])

    def open_store(config: StoreConfig) -> PrefixStore:
        for opening in opens:
            return opening(config)
        raise OSError("the disk has gone")

    async with tier_of(tmp_path, tenants_of(tmp_path), open_store=open_store) as tier:
        assert tier.report.total("loaded_tokens") == 9
        os.truncate(tmp_path / "prefix" / INDEX, 4096)
        await tier.refresh()
        assert not tier.report.available
        registry = CollectorRegistry()
        registry.register(PrefixCollector(lambda: tier.report, ["m", "new"]))
        for model, tokens in (("m", 7), ("n", 2), ("new", 0)):
            labels = {"model": model}
            assert (
                registry.get_sample_value("tierserve_prefix_loaded_tokens_total", labels) == tokens
            )


async def test_a_report_of_a_store_that_hangs_grows_stale(tmp_path: Path) -> None:
    now = 100.0
    config = StoreConfig(tmp_path / "prefix", MIN_BYTES)
    tier = PrefixTier(config, Purges(), PrefixLabels(tenants_of(tmp_path)), clock=lambda: now)
    await tier.refresh()
    assert tier.report.available
    now += HANGS_S + 1
    assert not tier.report.available
    await tier.refresh()
    assert tier.report.available
    await tier.close()


async def test_chains_are_listed_hottest_first_with_the_names_of_tenants(tmp_path: Path) -> None:
    store = opened(tmp_path / "prefix")
    for name, requests, *labels in (
        ("a", 2, "model:m", f"tenant:{ACME}"), ("b", 9, "model:n", f"tenant:{PARTNERS}"),
        ("c", 4, "model:m", "tenant:unknown"),
    ):  # fmt: skip
        store_chain(store, name, *labels, requests=requests)
    store.close()
    tenants = tenants_of(tmp_path, acme=None, east="partners", west="partners")
    async with tier_of(tmp_path, tenants) as tier:
        b, c, a = await tier.chains(10)
        assert (b.blocks, b.tokens, b.size) == (3, 3 * TOKENS, 3 * BLOCK_BYTES)
        assert b.priority > c.priority > a.priority
        assert b.labels == ("model:n", "tenant:east", "tenant:west")
        assert c.labels == ("model:m", "tenant:unknown")
        assert await tier.chains(1) == [b]
        assert await tier.chains(10, "model:m") == [c, a]
        assert await tier.chains(10, "tenant:acme") == [a]
        assert await tier.chains(10, "tag:x") == []
        assert await tier.verify() == {"blocks": 9, "damaged": 0}


async def test_it_is_not_closed_while_somebody_reads_it(tmp_path: Path) -> None:
    reading, goes_on = threading.Event(), threading.Event()

    class Slow(PrefixStore):
        is_closed = False

        def read(self, at: Location, block: memoryview, scratch: memoryview) -> None:
            reading.set()
            goes_on.wait()
            assert not self.is_closed
            super().read(at, block, scratch)

        def close(self) -> None:
            self.is_closed = True
            super().close()

    written(tmp_path, ("a", "model:m"))
    async with tier_of(tmp_path, tenants_of(tmp_path), open_store=Slow) as tier:
        verifying = asyncio.create_task(tier.verify())
        await asyncio.to_thread(reading.wait)
    goes_on.set()
    assert await verifying == {"blocks": 3, "damaged": 0}
