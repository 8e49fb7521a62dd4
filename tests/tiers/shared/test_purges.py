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
from tests.tiers.shared.conftest import Disk
from tests.waiting import HANGS_S
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


def shared_of(purges: Purges, backend: BaseCache, **options) -> SharedPurges:
    """Return what waits for a slow server, and answers a purge before others have polled."""
    given = {"every_s": -2 * HANGS_S, "deadline_s": HANGS_S} | options
    return SharedPurges(purges, backend, **given)


class Machine:
    """Looks at the server only when a test has it look."""

    def __init__(self, backend: BaseCache, unix: Callable[[], float], **options) -> None:
        self.purges = Purges(clock=unix)
        self.shared = shared_of(self.purges, backend, **options)


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
    # So soon only what never answers is to be given up.
    server.is_gone, one.shared._deadline_s = False, HANGS_S
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
        purges = Purges(disk, clock=lambda: 1.0, deadline_s=HANGS_S)
        # Nothing ends but by itself.
        shared = SharedPurges(purges, server, every_s=0, deadline_s=3600)
        entry = purges.provenance(["tag:a", "tag:b"])
        for tag in ("tag:a", "tag:b"):
            await other.shared.purge(tag)
            assert await asyncio.wait_for(shared.sync(), HANGS_S)
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
        await tier.put(key, value, 3600)
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
    two = Machine(backend, clock, every_s=0.2, deadline_s=HANGS_S, clock=lambda: now_s)
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
    now_s = known_s = 0.2 + 2 * HANGS_S
    assert await chain.lookup("k") is not None
    # Only now those who purged take it for done.
    now_s = known_s + 0.1
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


async def test_takes_and_stores_nothing_there_while_purges_cannot_be_read(clock) -> None:
    """Reads and writes may succeed before the first poll does, after a time without the server."""
    server = Gone(serializer=NullSerializer(encoding=None))
    server.is_gone = False
    purges = Purges(clock=clock)
    shared = SharedPurges(purges, server, every_s=0, deadline_s=HANGS_S)
    near = Tier("memory", MemoryCache(10_000, clock=clock), clock=clock)
    far = Tier("shared", server, shared=True, clock=clock)
    chain = Chain(
        [near, far],
        frequency=FrequencySketch(64),
        max_answer_bytes=99,
        clock=clock,
        purges=purges,
        shared_purges=shared,
    )
    assert await shared.sync()
    assert await chain.store("old", Answer(JSON, b"1"), Freshness(60))
    server.is_gone = True
    assert not await shared.sync()
    server.is_gone = False
    await near.remove("old")
    assert await chain.lookup("old") is None
    clock.now += 1
    assert await chain.store("old", Answer(JSON, b"2"), Freshness(60))
    assert await chain.store("new", Answer(JSON, b"2"), Freshness(60))
    assert not await server.exists("new")
    assert await shared.sync()
    await near.remove("old")
    # What should have been replaced there, which others may still find.
    assert await chain.lookup("old") is None


@pytest.mark.parametrize("ahead_s", [-1e9, 1e9])
async def test_a_restart_that_reads_its_purges_late_loses_none(ahead_s) -> None:
    """Neither its own nor others', though nobody is left who knew them before."""
    server, disk = Gone(serializer=NullSerializer(encoding=None)), Disk()
    server.is_gone = False
    gone, clock = Machine(server, lambda: 2e9), lambda: 2e9 + ahead_s
    await gone.shared.purge("tag:b")
    theirs = gone.purges.provenance(["tag:a"])
    server.is_gone = True
    before = Purges(disk, clock=clock)
    with pytest.raises(PurgeError, match="shared tier"):
        await shared_of(before, server).purge("tag:a")
    ours = before.provenance(["tag:c"])
    server.is_gone = disk.is_open = False
    await gone.shared.purge("tag:c")
    purges = Purges(disk, clock=clock)
    shared = shared_of(purges, server)
    assert await shared.sync()
    await purges.close()
    disk.is_open = True
    purges.current()
    assert await shared.sync()
    new = Machine(server, clock)
    assert await new.shared.sync()
    for each in (purges, new.purges):
        assert each.is_purged("k", theirs)
        assert each.is_purged("k", ours)
        assert not each.is_purged("k", each.provenance(["tag:a", "tag:c"]))


@pytest.mark.parametrize("by_other", [False, True])
async def test_a_purge_is_above_what_a_process_has_just_purged_without_the_server(by_other) -> None:
    """Where that process has the same disk, which this one hasn't looked at since."""
    cut, server = (Gone(serializer=NullSerializer(encoding=None)) for _ in range(2))
    server.is_gone, disk = False, Disk()
    one = Purges(disk, clock=lambda: 2e9)
    two = Purges(disk, clock=lambda: 1e9, monotonic=lambda: 0)
    other, shared = Machine(server, lambda: 1e9), shared_of(two, server)
    assert await shared.sync()
    await two.purge("tag:b")
    assert await shared.sync()
    with pytest.raises(PurgeError):
        await shared_of(one, cut).purge("tag:c")
    made = one.provenance(["tag:a"])
    await (other.shared if by_other else shared).purge("tag:a")
    assert await shared.sync()
    assert await other.shared.sync()
    for each in (two, other.purges, Purges(disk)):
        assert each.is_purged("k", made)


async def test_a_purge_without_the_server_may_come_while_others_are_written_to_the_disk() -> None:
    class Slow(Disk):
        async def update(self, *args) -> bool:
            await is_written.wait()
            return await disk.update(*args)

        def reload(self, *args) -> bytes | None:
            return disk.reload(*args)

    cut, server = (Gone(serializer=NullSerializer(encoding=None)) for _ in range(2))
    server.is_gone, disk, is_written = False, Disk(), asyncio.Event()
    other = Machine(server, lambda: 2e9)
    await other.shared.purge("tag:b")
    made = other.purges.provenance(["tag:a"])
    await Purges(disk, clock=lambda: 1e9).purge("tag:c")
    two = Purges(Slow(), clock=lambda: 1e9)
    two.current()
    shared = SharedPurges(two, server, every_s=0, deadline_s=HANGS_S)
    syncing = asyncio.create_task(shared.sync())
    while len(two.table) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(PurgeError):
        await shared_of(Purges(disk, clock=lambda: 1e9), cut).purge("tag:a")
    is_written.set()
    assert await syncing
    assert await shared.sync()
    # Whoever is new hasn't known either before.
    new = Machine(server, lambda: 1e9)
    assert await new.shared.sync()
    assert two.is_purged("k", made)
    assert new.purges.is_purged("k", made)


async def test_what_was_purged_while_it_was_being_stored_reaches_no_other_machine(clock) -> None:
    """Its epoch is that of a purge which the others don't know yet, and so looks new to them."""

    class Slow(aiocache.SimpleMemoryCache):
        async def _set(self, *args, **options):
            await stores.wait()
            return await super()._set(*args, **options)

    stores = asyncio.Event()
    mine, theirs = (Gone(serializer=NullSerializer(encoding=None)) for _ in range(2))
    mine._cache, theirs.is_gone = theirs._cache, False
    one, two = Machine(mine, lambda: 2e9), Machine(theirs, lambda: 1e9)
    near = Tier("near", Slow(serializer=NullSerializer(encoding=None)), clock=clock)
    chain = Chain(
        [near, Tier("shared", mine, shared=True, clock=clock)],
        frequency=FrequencySketch(64),
        max_answer_bytes=99,
        clock=clock,
        purges=one.purges,
    )
    with pytest.raises(PurgeError):
        await one.shared.purge("tag:b")
    made = chain.provenance(["tag:a"])
    assert await two.shared.sync()
    await two.shared.purge("tag:a")
    storing = asyncio.create_task(
        chain.store("k", Answer(JSON, b"1"), Freshness(60), provenance=made)
    )
    await asyncio.sleep(0)
    mine.is_gone = False
    assert await one.shared.sync()
    stores.set()
    await storing
    assert await Tier("shared", theirs, shared=True, clock=clock).get("k", two.purges) is None


@pytest.mark.parametrize("withholds", [False, True])
async def test_without_the_server_gives_out_what_it_has_or_nothing(clock, withholds) -> None:
    server = Gone(serializer=NullSerializer(encoding=None))
    purges = Purges(clock=clock)
    shared = SharedPurges(purges, server, every_s=0, deadline_s=HANGS_S, withholds=withholds)
    provenance = purges.provenance()
    for server.is_gone in (False, True, False):
        assert await shared.sync() is not server.is_gone
        assert purges.is_purged("k", provenance) is (server.is_gone and withholds)


async def test_a_process_that_stood_still_in_a_poll_tries_again_at_once(clock) -> None:
    now_s = 0.0

    class Stopped(aiocache.SimpleMemoryCache):
        stops = False

        async def _get(self, key, encoding="utf-8", _conn=None):
            nonlocal now_s
            if self.stops:
                # As by SIGSTOP: when it goes on, the deadline is over before the reply is read.
                self.stops, now_s = False, now_s + HANGS_S + 3
                raise TimeoutError
            return await super()._get(key, encoding, _conn)

    server = Stopped(serializer=NullSerializer(encoding=None))
    one = Machine(server, clock)
    two = Machine(server, clock, clock=lambda: now_s)
    assert await two.shared.sync()
    entry = two.purges.provenance()
    await one.shared.purge("all")
    server.stops = True
    assert await two.shared.sync()
    assert two.purges.is_purged("k", entry)
    assert two.shared.errors == 0
