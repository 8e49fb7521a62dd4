"""Purges over a server that machines share: any backend of aiocache, a real Redis, a Memcached."""

import asyncio
import fcntl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiocache
import pytest
from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from tests.servers import SERVERS
from tests.tiers.conftest import JSON
from tiers import (
    Answer,
    Chain,
    DiskCache,
    Entry,
    FrequencySketch,
    Freshness,
    MemoryCache,
    PurgeError,
    Purges,
    Tier,
)
from tiers.disk.recovery import LOCK
from tiers.shared.purges import SharedPurges


@pytest.fixture(params=["any", *SERVERS])
async def connect(request, tmp_path: Path) -> AsyncIterator[Callable[[], BaseCache]]:
    """Return what gives a machine its connection to one and the same server."""
    if request.param == "any":
        cache = aiocache.SimpleMemoryCache(serializer=NullSerializer(encoding=None))
        yield lambda: cache
        return
    server, made = SERVERS[request.param](tmp_path), []

    def connection() -> BaseCache:
        made.append(server.open())
        return made[-1]

    try:
        yield connection
        for each in made:
            await each.close()
    finally:
        server.kill()


class Machine:
    """Looks at the server only when a test has it look."""

    def __init__(self, backend: BaseCache, unix: Callable[[], float], **options) -> None:
        self.purges = Purges(clock=unix)
        options = {"every_s": 0, "deadline_s": 0.5} | options
        self.shared = SharedPurges(self.purges, backend, **options)


async def test_what_one_machine_purges_no_other_gives_out(connect) -> None:
    """Whatever their clocks say."""
    clocks = [lambda: 2e9, lambda: 1e9, lambda: 3e9]
    one, two, three = (Machine(connect(), clock) for clock in clocks)
    for each in (one, two, three):
        entry = [machine.purges.provenance(["model:m"]) for machine in (one, two, three)]
        await each.shared.purge("model:m")
        for machine in (one, two, three):
            assert await machine.shared.sync()
            assert all(machine.purges.is_purged("k", origin) for origin in entry)
            assert not machine.purges.is_purged("k", machine.purges.provenance(["model:m"]))
    assert one.purges.table == two.purges.table == three.purges.table


async def test_many_labels_reach_others_together(connect) -> None:
    one, two = Machine(connect(), lambda: 1.0), Machine(connect(), lambda: 1.0)
    labels = [f"key:{n:064x}" for n in range(1000)]
    await one.shared.purge(*labels)
    assert await two.shared.sync()
    assert len(two.purges.table) == 1000
    # As one compare-and-set gives all of them one number.
    assert len(set(two.purges.table._epochs.values())) == 1


async def test_many_at_once_all_get_numbers_of_their_own(connect) -> None:
    machines = [Machine(connect(), lambda: 1.0) for _ in range(4)]
    for each in machines:
        await each.shared.sync()
    entries = [each.purges.provenance([f"tag:{n}"]) for n, each in enumerate(machines)]
    await asyncio.gather(*(each.shared.purge(f"tag:{n}") for n, each in enumerate(machines)))
    for each in machines:
        assert await each.shared.sync()
        assert all(each.purges.is_purged("k", entry) for entry in entries)
        assert len(each.purges.table) == len(machines)


async def test_a_server_that_lost_it_is_told_again(connect) -> None:
    one, two = Machine(connect(), lambda: 1.0), Machine(connect(), lambda: 1.0)
    entry = two.purges.provenance(["tag:a"])
    await one.shared.purge("tag:a")
    await connect().delete("purges")
    assert await two.shared.sync()
    assert not two.purges.is_purged("k", entry)
    assert await one.shared.sync()
    assert await two.shared.sync()
    assert two.purges.is_purged("k", entry)


async def test_what_cannot_be_read_purges_everything(connect) -> None:
    one, two = Machine(connect(), lambda: 1.0), Machine(connect(), lambda: 1.0)
    entry = one.purges.provenance()
    await connect().set("purges", b"\xff not ours")
    assert await one.shared.sync()
    assert await two.shared.sync()
    assert one.purges.is_purged("k", entry)
    assert two.purges.is_purged("k", entry)
    assert not two.purges.is_purged("k", two.purges.provenance())


class Gone(aiocache.SimpleMemoryCache):
    is_gone = True

    async def _get(self, key, encoding="utf-8", _conn=None):
        if self.is_gone:
            raise ConnectionRefusedError
        return await super()._get(key, encoding, _conn)


class Silent(aiocache.SimpleMemoryCache):
    is_gone = True

    async def _get(self, key, encoding="utf-8", _conn=None):
        if self.is_gone:
            await asyncio.Event().wait()
        return await super()._get(key, encoding, _conn)


@pytest.mark.parametrize("kind", [Gone, Silent])
async def test_says_that_the_server_was_not_told_and_tells_it_later(kind, caplog) -> None:
    server = kind(serializer=NullSerializer(encoding=None))
    one = Machine(server, lambda: 1.0, deadline_s=0.01)
    two = Machine(server, lambda: 1.0)
    entry = one.purges.provenance(["tag:a"])
    with pytest.raises(PurgeError, match="it holds on this machine"):
        await one.shared.purge("tag:a")
    assert not await one.shared.sync()
    assert one.purges.is_purged("k", entry)
    assert one.shared.errors == 2
    server.is_gone = False
    assert await one.shared.sync()
    assert await two.shared.sync()
    assert two.purges.is_purged("k", entry)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_a_disk_that_is_not_open_holds_up_no_look(tmp_path, caplog) -> None:
    server = aiocache.SimpleMemoryCache(serializer=NullSerializer(encoding=None))
    other = Machine(server, lambda: 1.0)
    (tmp_path / "disk").mkdir()
    with (tmp_path / "disk" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        disk = DiskCache(tmp_path / "disk", 1 << 20)
        purges = Purges(disk, clock=lambda: 1.0)
        # Nothing ends but by itself.
        shared = SharedPurges(purges, server, every_s=0, deadline_s=3600)
        entry = purges.provenance(["tag:a", "tag:b"])
        for tag in ("tag:a", "tag:b"):
            await other.shared.purge(tag)
            assert await asyncio.wait_for(shared.sync(), 60)
        assert not disk.is_open
        assert len(purges._tasks) == 1
        assert purges.is_purged("k", entry)
        assert (shared.errors, caplog.records) == (0, [])
    await disk.opened()
    await purges.close()
    assert Purges(disk).provenance().purge_epoch == purges.table.latest
    await disk.close()


async def test_nothing_shared_is_given_out_before_the_purges_are_known(clock, connect) -> None:
    """Such as after a kill, while the disk's file is verified and the server answers late."""
    backend = connect()
    one = Machine(backend, clock)
    tier = Tier("shared", backend, shared=True, clock=clock)
    value = Entry(Answer(JSON, b"1"), clock.now, clock.now + 60).encode()
    await one.shared.sync()
    for key in ("k", "purged"):
        await tier.put(key, value, 60)
        assert await tier.get(key, one.purges) is not None
    restarted = Machine(backend, clock)
    assert [await tier.get(key, restarted.purges) for key in ("k", "purged")] == [None, None]
    await restarted.shared.purge("key:purged")
    assert await tier.get("purged", restarted.purges) is None
    assert await tier.get("k", restarted.purges) is not None


async def test_a_process_that_stood_still_looks_before_it_gives_anything_out(
    clock, connect, monkeypatch
) -> None:
    now_s, backend = 0.0, connect()
    one = Machine(connect(), clock)
    two = Machine(backend, clock, every_s=0.2, deadline_s=1, clock=lambda: now_s)
    chain = Chain(
        [Tier("memory", MemoryCache(10_000, clock=clock), clock=clock)],
        frequency=FrequencySketch(64),
        max_answer_bytes=99,
        clock=clock,
        purges=two.purges,
        shared_purges=two.shared,
    )
    assert await two.shared.sync()
    assert await chain.store("k", Answer(JSON, b"1"), Freshness(60))
    await one.shared.purge("all")
    now_s = 2.2
    assert await chain.lookup("k") is not None
    # Only now those who purged take it for done.
    now_s = 2.3
    get, looks = backend.get, []

    async def counted(*args, **options):
        looks.append(args)
        return await get(*args, **options)

    monkeypatch.setattr(backend, "get", counted)
    assert await asyncio.gather(*[chain.lookup("k") for _ in range(5)]) == [None] * 5
    # Once for all of them.
    assert len(looks) == 1
    assert await chain.peek("k") is None
    assert not two.shared.is_behind
