"""Kills, full disks, damage: what the disk tier must survive.

Short by default; with TIERSERVE_LONG=1 the random tests take many more rounds. What may crash
runs in a process of its own, forked from a server that has imported everything once.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import shake_128
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.tiers.child import Child
from tests.tiers.conftest import JSON
from tests.waiting import HANGS_S
from tiers import (
    Answer,
    Chain,
    DiskCache,
    FrequencySketch,
    Freshness,
    MemoryCache,
    Purges,
    Tier,
)  # fmt: skip
from tiers.disk import Durability
from tiers.disk.file import DATA, DiskFile
from tiers.disk.marks import MAX_DEATHS
from tiers.disk.recovery import _END_SIGNALS, Recovery
from tiers.disk.verify import VerifyReport, command, read_report, verify
from tiers.lmdb_pages import PageVerifier

MIB = 1024 * 1024
LONG = os.environ.get("TIERSERVE_LONG") == "1"
KILLS = 200 if LONG else 30
FLIPS = 1000 if LONG else 60
PAGE_BITS = 4096 * 8
NOBODY = 65534


def value_of(key: str) -> bytes:
    """Return the one value of a key: half random, half text, of up to 9 KB."""
    size = int.from_bytes(shake_128(key.encode()).digest(2)) % 4500
    return shake_128(key.encode()).digest(size) + f"{key} is what was asked. ".encode() * (
        size // 20
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def write_for_ever(
    connection: Connection,
    folder: Path,
    max_bytes: int,
    start: int,
    durability: Durability = Durability.COMMIT,
) -> None:
    async def main() -> None:
        cache = DiskCache(folder, max_bytes, durability=durability)
        connection.send(cache.is_open)
        await cache.opened()

        async def store(number: int) -> None:
            while True:
                if await cache.set(f"{number}", value_of(f"{number}")):
                    connection.send(f"{number}")
                number += 8

        await asyncio.gather(*(store(start + number) for number in range(8)))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("max_bytes", "kills", "durability"),
    [
        (1024 * MIB, KILLS, Durability.COMMIT),
        (1024 * MIB, KILLS // 3, Durability.OS),
        (MIB, KILLS // 3, Durability.COMMIT),
    ],
    ids=["large", "unsynced", "evicting"],
)
def test_a_kill_loses_nothing_that_was_acknowledged(
    tmp_path: Path, max_bytes: int, kills: int, durability: Durability
) -> None:
    """Nor does it make the tier cold: the next start opens the file at once.

    Only after a few kills in a row the file is suspected to be what kills, and verified.
    """
    chance = random.Random(kills)
    acknowledged: set[str] = set()
    for number in range(kills):
        start, is_suspected = number * 100_000, number > 0 and number % MAX_DEATHS == 0
        with Child(write_for_ever, tmp_path, max_bytes, start, durability) as child:
            left = chance.randrange(1, 120)
            assert child.connection.recv() is not is_suspected
            for key in child.receive():
                acknowledged.add(key)
                left -= 1
                if left == 0:
                    child.process.kill()
        assert left <= 0
        report = verify(tmp_path)
        assert report.damaged == 0
        file = DiskFile(tmp_path, max_bytes)
        found = {key.decode() for key in file.all_keys()}
        if max_bytes > MIB:
            assert acknowledged <= found
        for key in found:
            value, _ = file.get(key.encode())
            assert value == value_of(key)
        file.close()
        assert (tmp_path / DATA).stat().st_size <= max_bytes


def write_and_close(connection: Connection, folder: Path, max_bytes: int, keys: range) -> None:
    async def main() -> None:
        cache = DiskCache(folder, max_bytes)
        await cache.opened()
        connection.send("open")
        connection.recv()
        stored: list[bool] = []
        for key in range(keys.start, keys.stop, 20):
            batch = [f"{each}" for each in range(key, min(key + 20, keys.stop))]
            stored += await asyncio.gather(*(cache.set(each, value_of(each)) for each in batch))
        read = [cache.read(f"{key}") in (None, value_of(f"{key}")) for key in keys]
        await cache.close()
        connection.send((all(stored), all(read)))

    asyncio.run(main())


@pytest.mark.parametrize("max_bytes", [64 * MIB, MIB])
def test_two_processes_write_at_once(tmp_path: Path, max_bytes: int) -> None:
    with (
        Child(write_and_close, tmp_path, max_bytes, range(300)) as one,
        Child(write_and_close, tmp_path, max_bytes, range(200, 500)) as other,
    ):
        assert [child.connection.recv() for child in (one, other)] == ["open", "open"]
        for child in (one, other):
            child.connection.send("go")
        assert [list(child.receive()) for child in (one, other)] == [[(True, True)]] * 2
    assert verify(tmp_path).damaged == 0
    file = DiskFile(tmp_path, max_bytes)
    found = {key.decode() for key in file.all_keys()}
    assert all(file.get(key.encode())[0] == value_of(key) for key in found)
    file.close()
    if max_bytes > MIB:
        assert found == {f"{key}" for key in range(500)}
    assert (tmp_path / DATA).stat().st_size <= max_bytes
    assert (tmp_path / "clean").exists()


async def test_the_smallest_limit_counts(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    with Child(write_and_close, tmp_path, 62 * MIB, range(1000)) as child:
        assert child.connection.recv() == "open"
        child.connection.send("go")
        assert list(child.receive()) == [(True, True)]
    assert (tmp_path / DATA).stat().st_size > 2 * MIB
    assert await cache.get("999") in (None, value_of("999"))
    assert await cache.set("mine", b"1")
    assert await cache.multi_get(["999", "mine"]) == [value_of("999"), b"1"]
    assert cache.usage.bytes <= MIB
    await cache.close()
    again = DiskCache(tmp_path, MIB)
    await again.opened()
    assert await again.get("mine") == b"1"
    assert (tmp_path / DATA).stat().st_size <= MIB
    await again.close()


async def test_the_other_process_is_killed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 64 * MIB)
    with Child(write_for_ever, tmp_path, 64 * MIB, 0) as child:
        assert child.connection.recv()
        for key in child.receive():
            assert await cache.get(str(key)) == value_of(str(key))
            if int(str(key)) > 100:
                break
    assert await cache.set("mine", b"1")
    await cache.close()
    assert verify(tmp_path).damaged == 0


async def fill(cache: DiskCache) -> list[str]:
    """Store until a store is refused; return the keys of those that were not."""
    stored: list[str] = []
    while await cache.set(f"{len(stored)}", os.urandom(10_000)):
        stored.append(f"{len(stored)}")
    return stored


async def test_a_full_disk(disk: Path, caplog, monkeypatch) -> None:
    # It isn't tried again before the test says so.
    monkeypatch.setattr("tiers.disk.writer._FIRST_DELAY_S", 60.0)
    cache = DiskCache(disk, 64 * MIB)
    stored = await fill(cache)
    assert len(stored) > 100
    assert all(await cache.multi_get(stored))
    for number in range(10):
        assert not await cache.set(f"more {number}", os.urandom(10_000))
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    (error,) = errors
    assert error.exc_info is None
    # LMDB calls it an error of input or output where a part of a page found room.
    message = "(No space left on device|Input/output error); 1 writes have failed so far"
    assert re.search(message, error.message)
    assert cache.usage.refused == 11
    assert all(await cache.multi_get(stored))
    remount(disk, "size=64m")
    monkeypatch.setattr(cache._writer._outage, "until", 0.0)
    assert await cache.set("more", os.urandom(10_000))
    assert caplog.records[-1].message.startswith("the disk tier stores again")
    await cache.close()
    assert verify(disk).damaged == 0


@pytest.mark.parametrize("durability", Durability)
async def test_a_full_disk_shows_nothing_that_was_to_be_replaced(
    disk: Path, monkeypatch, durability
) -> None:
    cache = DiskCache(disk, 64 * MIB, durability=durability, interval_s=0.001)
    keys = [f"{number}" for number in range(100)]
    old, new = ({key: os.urandom(10_000) for key in keys} for _ in range(2))
    assert all([await cache.set(key, old[key]) for key in keys])
    await cache.save("settled", b"")
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))
    for key in keys:
        await cache.set(key, new[key])
        assert cache.read(key) in (new[key], None)
    # What an interval has queued fails now, and not while the disk has room again.
    while cache.queued_bytes:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert not await cache.save("settled", bytes(100_000))
    assert cache.usage.refused > 0
    assert all(cache.read(key) in (new[key], None) for key in keys)
    assert all(value == new[key] for key, value, _ in cache.hottest())
    (disk / "filler").unlink()
    monkeypatch.setattr(cache._writer._outage, "until", 0.0)
    assert await cache.set("more", b"1")
    await cache.close()
    again = DiskCache(disk, 64 * MIB)
    assert all(again.read(key) in (new[key], None) for key in keys)
    await again.close()


def fill_up_to_a_limit(connection: Connection, folder: Path) -> None:
    async def main() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
        cache = DiskCache(folder, 64 * MIB)
        stored = await fill(cache)
        connection.send((len(stored), all(cache.read(key) for key in stored)))
        await cache.close()

    asyncio.run(main())


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    with Child(fill_up_to_a_limit, tmp_path) as child:
        ((stored, all_there),) = child.receive()
        child.process.join()
        assert child.process.exitcode == 0
    assert stored > 50
    assert all_there
    assert verify(tmp_path).damaged == 0


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("")
    with pytest.raises(OSError, match=r"can't use the folder.*disk'"):
        DiskCache(tmp_path / "disk", MIB)


def test_a_folder_that_is_read_only(disk: Path) -> None:
    remount(disk, "ro")
    with pytest.raises(OSError, match=r"can't use the folder: Read-only file system.*disk'"):
        DiskCache(disk, MIB)


def open_as_nobody(connection: Connection, folder: Path) -> None:
    os.setgroups([])
    os.setuid(NOBODY)
    try:
        DiskCache(folder, MIB)
    except OSError as exc:
        connection.send(str(exc))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    with Child(open_as_nobody, tmp_path / "disk") as child:
        (message,) = child.receive()
    assert "the disk tier can't use the folder: Permission denied" in message


def verify_in_fork(recovery: Recovery, *, repair: bool) -> VerifyReport:
    """Verify as `Recovery.verify` does, in a process that needn't import everything first."""
    read, write = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (HANGS_S, HANGS_S))
            try:
                report = verify(recovery.folder, repair=repair)
            except ValueError as exc:
                report = VerifyReport(0, 0, str(exc))
            os.write(write, json.dumps(report._asdict()).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as ours:  # noqa: PTH123
        output = ours.read()
    _, status = os.waitpid(child, 0)
    return read_report(output, os.waitstatus_to_exitcode(status))


def serve_damaged(connection: Connection, whole: Path, folder: Path, trials: list[int]) -> None:
    """Flip a bit in a copy of the file, open it, read all and write; once for each trial."""
    Recovery.verify = verify_in_fork

    async def serve(place: int) -> tuple[int, int, int]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        with (folder / DATA).open("r+b") as file:
            file.seek(place // 8)
            byte = file.read(1)[0]
            file.seek(place // 8)
            file.write(bytes([byte ^ 1 << place % 8]))
        cache = DiskCache(folder, 8 * MIB, durability=Durability.OS)
        await cache.opened()
        right = wrong = 0
        for number in range(200):
            found = cache.read(f"{number}")
            right += found == value_of(f"{number}")
            wrong += found not in (None, value_of(f"{number}"))
        news = [f"{number}" for number in range(100, 300)]
        await asyncio.gather(*(cache.set(key, value_of(key)) for key in news))
        for number in range(100, 300):
            wrong += cache.read(f"{number}") != value_of(f"{number}")
        await cache.close()
        return right, wrong, len(list(folder.glob(f"{DATA}.aside-*")))

    for place in trials:
        connection.send((place, None))
        connection.send((place, asyncio.run(serve(place))))


def tree_pages(data: Path) -> list[int]:
    """Return the numbers of the pages that are no values: meta, branch and leaf pages."""
    with data.open("rb") as file:
        pages = PageVerifier(file, data.stat().st_size)
        assert pages.verify() == []
        live = [page for page in range(2, pages.next_pgno) if pages.live[page]]
        return [0, 1] + [page for page in live if pages.read_page(page)[10] in (1, 2)]


@pytest.mark.timeout(3600 if LONG else 1800)
async def test_flipped_bits(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "whole", 8 * MIB)
    await asyncio.gather(*(cache.set(f"{n}", value_of(f"{n}"), ttl=1e9) for n in range(200)))
    await cache.close()
    chance, bits = random.Random(1), (tmp_path / "whole" / DATA).stat().st_size * 8
    # Most of a file is values, so aim half of the bits at what LMDB itself reads.
    aimed = [page * PAGE_BITS + chance.randrange(PAGE_BITS) for page in chance.choices(
        tree_pages(tmp_path / "whole" / DATA), k=FLIPS // 2)]  # fmt: skip
    trials = [*aimed, *chance.sample(range(bits), FLIPS - len(aimed))]
    halves = [trials[::2], trials[1::2]]
    children = [
        Child(serve_damaged, tmp_path / "whole", tmp_path / f"copy{number}", half)
        for number, half in enumerate(halves)
    ]
    kept = started = ended = 0
    for child in children:
        with child:
            place = None
            for place, result in child.receive():
                started += result is None
                if result is not None:
                    right, wrong, aside = result
                    assert wrong == 0, f"bit {place}"
                    assert right >= 199 or (right, aside) == (0, 1), f"bit {place}"
                    kept += right >= 199
                    ended += 1
            child.process.join()
            assert child.process.exitcode == 0, f"bit {place}"
    assert started == ended == FLIPS
    assert FLIPS / 4 < kept < FLIPS


def test_another_format_is_set_aside(tmp_path: Path, caplog, monkeypatch) -> None:
    async def main() -> list[bytes | None]:
        cache = DiskCache(tmp_path, MIB)
        await cache.opened()
        before = await cache.get("a")
        await cache.set("a", b"1")
        await cache.close()
        return [before]

    assert asyncio.run(main()) == [None]
    assert asyncio.run(main()) == [b"1"]
    monkeypatch.setattr("tiers.disk.file.FORMAT", 99)
    assert asyncio.run(main()) == [None]
    assert "its format is b'3', not 99" in caplog.text
    assert len(list(tmp_path.glob(f"{DATA}.aside-*"))) == 1


async def test_what_is_not_lmdb_is_set_aside(tmp_path: Path, may_verify) -> None:
    (tmp_path / DATA).write_bytes(b"not a database" * 1000)
    cache = DiskCache(tmp_path, MIB)
    assert await cache.get("a") is None
    assert not await cache.set("a", b"1")
    assert await cache.get("a") == b"1"
    may_verify.set()
    await cache.opened()
    assert await cache.set("b", b"1")
    assert await cache.get("a") == b"1"
    await cache.close()
    aside = list(tmp_path.glob(f"{DATA}.aside-*"))
    assert [file.read_bytes()[:14] for file in aside] == [b"not a database"]


def stands_in(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a shell's script in place of the verifier."""
    made = folder / "python"
    made.write_text(f"#!/bin/sh\n{script}\n")
    made.chmod(0o700)
    monkeypatch.setattr("tiers.disk.verify.sys.executable", str(made))


@pytest.mark.parametrize(
    ("program", "bound_s", "message"),
    [
        ("kill -SEGV $$", 60.0, "ended with status -11"),
        ("while :; do :; done", 1.0, "took 1 s of CPU"),
    ],
)
async def test_a_verifier_that_fails_is_damage(
    tmp_path: Path, monkeypatch, caplog, program: str, bound_s: float, message: str
) -> None:
    cache = DiskCache(tmp_path / "disk", MIB)
    await cache.set("a", b"1")
    await cache.close()
    (tmp_path / "disk" / "clean").unlink()
    stands_in(f"exec 1>&-\n{program}", tmp_path, monkeypatch)
    monkeypatch.setattr("tiers.disk.recovery._VERIFY_S", bound_s)
    again = DiskCache(tmp_path / "disk", MIB)
    await again.opened()
    assert await again.get("a") is None
    assert message in caplog.text
    await again.close()


@pytest.mark.parametrize("number", _END_SIGNALS)
async def test_a_verifier_that_is_asked_to_end_proves_no_damage(
    tmp_path: Path, monkeypatch, number: signal.Signals
) -> None:
    cache = DiskCache(tmp_path / "disk", MIB)
    await cache.set("a", b"1")
    await cache.close()
    (tmp_path / "disk" / "clean").unlink()
    once = f"mkdir {tmp_path}/once 2>/dev/null && kill -{number.value} $$"
    stands_in(f'{once}\nexec {sys.executable} "$@"', tmp_path, monkeypatch)
    again = DiskCache(tmp_path / "disk", MIB)
    await again.opened()
    assert (tmp_path / "once").exists()
    assert await again.get("a") == b"1"
    await again.close()


@pytest.mark.parametrize("how", ["nobody reads", "SIGINT"])
def test_a_verifier_ends_with_who_started_it(tmp_path: Path, how: str) -> None:
    os.mkfifo(tmp_path / DATA)
    words, env = command(tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=env, **pipes) as process:
        # It waits for who writes there, for ever, and a thread of it for the end of its reader.
        while psutil.Process(process.pid).num_threads() < 2:
            time.sleep(0.01)
        if how == "SIGINT":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == (-signal.SIGINT if how == "SIGINT" else 1)


def grow_and_purge(connection: Connection, folder: Path) -> None:
    async def main() -> None:
        disk = DiskCache(folder, 16 * MIB)
        await disk.opened()
        for number in range(100):
            await disk.set(f"{number}", os.urandom(50_000))
        connection.send(await Purges(disk, deadline_s=HANGS_S).purge("key:purged"))
        await asyncio.Event().wait()

    asyncio.run(main())


async def test_a_file_that_another_process_grows_is_read_again_soon(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tiers.disk.writer._IDLE_S", 3600.0)
    chain = chain_on(tmp_path)
    disk = chain.tiers[1].backend
    for key in ("k", "purged"):
        assert await chain.store(key, Answer(JSON, b"{}"), Freshness(3600))
    with Child(grow_and_purge, tmp_path) as child:
        assert next(child.receive()) is None
        assert disk.statistics() is None
        assert await chain.lookup("purged") is None
        async with asyncio.timeout(HANGS_S):
            while disk.statistics() is None or await chain.lookup("k") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await chain.lookup("purged") is None
        await chain.close()


async def test_closing_does_not_wait_for_the_verifier(tmp_path: Path, monkeypatch) -> None:
    stands_in("exec sleep 3600", tmp_path, monkeypatch)
    (tmp_path / DATA).write_bytes(b"not a database" * 1000)
    cache = DiskCache(tmp_path, MIB)
    waiting = asyncio.ensure_future(cache.delete("a"))
    await asyncio.sleep(0)
    await cache.close()
    assert await waiting == 0
    assert (tmp_path / DATA).exists()


async def test_a_damaged_record_that_nobody_noticed_is_a_miss(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    value = os.urandom(3000)
    await cache.set("a", value)
    await cache.set("b", b"1")
    # The page changes behind the open file, as when memory or the disk fail.
    with (tmp_path / DATA).open("r+b") as file:
        where = (tmp_path / DATA).read_bytes().index(value)
        file.seek(where)
        file.write(b"\x00" * 10)
    assert await cache.multi_get(["a", "b"]) == [None, b"1"]
    assert cache.usage.damaged == 1
    await cache.close()
    assert not (tmp_path / "clean").exists()
    assert verify(tmp_path).damaged == 0


LABELS = ["model:m"]


def chain_on(folder: Path, durability: Durability = Durability.COMMIT) -> Chain:
    disk = DiskCache(folder, MIB, durability=durability)
    tiers = [Tier("memory", MemoryCache(MIB)), Tier("disk", disk)]
    sketch, purges = FrequencySketch(1024), Purges(disk, deadline_s=HANGS_S)
    return Chain(tiers, frequency=sketch, max_answer_bytes=1000, purges=purges)


def store_and_look_up(connection: Connection, folder: Path) -> None:
    async def main() -> None:
        chain = chain_on(folder)
        while True:
            if connection.recv() == "store":
                await chain.store(
                    "k",
                    Answer(JSON, b"{}"),
                    Freshness(3600),
                    provenance=chain.provenance(LABELS),
                )
            connection.send(await chain.lookup("k") is not None)

    asyncio.run(main())


async def test_what_one_process_purges_no_other_gives_out(tmp_path: Path) -> None:
    with Child(store_and_look_up, tmp_path) as child:

        def ask(what: str) -> bool:
            child.connection.send(what)
            return child.connection.recv()

        assert ask("store")
        chain = chain_on(tmp_path)
        for _ in range(20):
            assert ask("store")
            assert ask("look up")
            assert await chain.lookup("k") is not None
            await chain.purge("model:m")
            assert not ask("look up")
            assert await chain.lookup("k") is None
        await chain.close()


def purge_and_wait(connection: Connection, folder: Path, durability: Durability) -> None:
    async def main() -> None:
        chain = chain_on(folder, durability)
        for key in ("k", "other"):
            await chain.store(
                key, Answer(JSON, b"{}"), Freshness(3600), provenance=chain.provenance(LABELS)
            )
        await chain.purge("key:k")
        connection.send("purged")
        await asyncio.Event().wait()

    asyncio.run(main())


@pytest.mark.parametrize("durability", Durability)
async def test_a_kill_brings_back_nothing_that_was_purged(tmp_path: Path, durability) -> None:
    with Child(purge_and_wait, tmp_path, durability) as child:
        assert next(child.receive()) == "purged"
    chain = chain_on(tmp_path)
    disk = chain.tiers[1].backend
    assert disk.is_open
    assert await chain.lookup("other") is not None
    assert await chain.lookup("k") is None
    await chain.close()
