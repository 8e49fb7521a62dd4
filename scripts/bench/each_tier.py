"""Each tier alone: speed and stalls; what memory takes, and how the disk tier starts.

Values are answers of about 2 KB cut from Python's help, and keys are digests, as in service.
Lookups are of random keys that the tier holds; stores are of new keys, by many tasks at once. A
stall is how late the event loop wakes a task that sleeps for a millisecond, while the tasks store.
The memory that the process grows by while the memory tier is filled stands beside what the tier
counts.

Memory and disk are read inline, one key after another, without the chain, HTTP or JSON, so a hit of
the server takes far longer than a lookup here. The shared tier's servers run on the loopback, and
many tasks look up at once, so a lookup's time includes waiting for the others.

Usage: each_tier.py [--entries N] [--operations N] [--tasks N] [--folder PATH]
"""

import argparse
import asyncio
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from pydoc_data.topics import topics

import orjson
import uvloop
from aiocache.base import BaseCache
from rows import print_row
from servers import free_port, running

from tiers import DiskCache, MemoryCache, digest
from tiers.backend import ByteCache
from tiers.disk import Durability
from tiers.disk.file import DATA, DiskFile
from tiers.disk.marks import CLEAN, Marks
from tiers.disk.recovery import Recovery
from tiers.disk.transaction import Change
from tiers.shared.memcached import MemcachedBytes
from tiers.shared.redis import RedisBytes

GIB = 1024**3
TEXT = "\n".join(topics.values())
BATCH = 2000
HELD = 100_000
Pairs = list[tuple[str, bytes]]


def main() -> int:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=1_000_000, help="on disk at start-up")
    parser.add_argument("--operations", type=int, default=20_000, help="lookups and stores")
    parser.add_argument("--tasks", type=int, default=64, help="that store at once")
    parser.add_argument("--folder", type=Path, help="where the files are made")
    options = parser.parse_args()
    # First, while the process has nothing to give back.
    asyncio.run(_memory())
    with tempfile.TemporaryDirectory(prefix="tierserve-bench-", dir=options.folder) as folder:
        uvloop.run(_speed(Path(folder), options))
        uvloop.run(_start(Path(folder) / "start", options))
    return 0


async def _memory() -> None:
    cache, before, raw_bytes = MemoryCache(GIB), _resident_bytes(), 0
    for number in range(HELD):
        value = _answer(number)
        raw_bytes += len(value)
        await cache.set(_key(number), value, ttl=3600)
    grown = _resident_bytes() - before
    print(f"{HELD:,} entries in memory: {raw_bytes / 1e6:,.1f} MB of answers,"
          f" {cache.usage.bytes / 1e6:,.1f} MB as the tier counts,"
          f" {grown / 1e6:,.1f} MB in the process\n")  # fmt: skip


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def _speed(folder: Path, options: argparse.Namespace) -> None:
    print(f"{'tier':<18} {'lookups/s':>10} {'p50 µs':>7} {'p99 µs':>7}"
          f" {'stores/s':>9} {'p50 ms':>7} {'p99 ms':>7} {'stall ms':>9}")  # fmt: skip
    rates = {"memory": await _measure("memory", MemoryCache(GIB), options)}
    for durability in Durability:
        cache = DiskCache(folder / durability, GIB, durability=durability)
        rates[durability] = await _measure(f"disk, {durability}", cache, options)
    port = free_port()
    redis = ["redis-server", "--bind", "127.0.0.1", "--port", f"{port}", "--save", "",
             "--dir", str(folder)]  # fmt: skip
    if _is_installed("redis-server"):
        with running(redis, port):
            await _measure("shared, redis", RedisBytes(f"redis://127.0.0.1:{port}/0"), options)
    port = free_port()
    memcached = ["memcached", "-l", "127.0.0.1", "-p", f"{port}", "-U", "0", "-m", "1024",
                 "-u", "nobody"]  # fmt: skip
    if _is_installed("memcached"):
        with running(memcached, port):
            await _measure("shared, memcached", MemcachedBytes("127.0.0.1", port), options)
    print_row("memory tier alone: lookups/s, stores/s", rates["memory"])
    commit, interval = rates[Durability.COMMIT], rates[Durability.INTERVAL]
    print_row("disk tier alone, `durability: commit` (`interval`)", f"{commit} ({interval})")


def _is_installed(program: str) -> bool:
    if is_there := shutil.which(program) is not None:
        return is_there
    print(f"{program} isn't installed")
    return False


async def _measure(name: str, cache: BaseCache, options: argparse.Namespace) -> str:
    """Print a row; returns lookups and stores a second."""
    pairs = [(_key(number), _answer(number)) for number in range(options.operations)]
    waiting, stores = iter(pairs), []

    async def store() -> None:
        for key, value in waiting:
            began = time.perf_counter()
            if not await cache.set(key, value, ttl=3600):
                raise ValueError("a store was refused")
            stores.append(time.perf_counter() - began)
            await asyncio.sleep(0)

    # The garbage collector's walk over this script's own values is no stall of the tier's.
    gc.collect()
    gc.freeze()
    began = time.perf_counter()
    stall = await _longest_stall(lambda: _together(store, options.tasks))
    store_s = time.perf_counter() - began
    if isinstance(cache, DiskCache):
        # What is queued has to be on its way before lookups are timed.
        await cache.save("end", b"")
    wanted = random.Random(1).sample(pairs, len(pairs))  # noqa: S311
    if isinstance(cache, ByteCache):
        lookups = _look_up(cache, wanted)
        lookup_s = sum(lookups)
    else:
        began = time.perf_counter()
        lookups = await _look_up_together(cache, wanted, options.tasks)
        lookup_s = time.perf_counter() - began
    await cache.close()
    lookup, stored = sorted(lookups), sorted(stores)
    print(f"{name:<18} {len(pairs) / lookup_s:>10,.0f} {_at(lookup, 50) * 1e6:>7.1f}"
          f" {_at(lookup, 99) * 1e6:>7.1f} {len(pairs) / store_s:>9,.0f}"
          f" {_at(stored, 50) * 1e3:>7.2f} {_at(stored, 99) * 1e3:>7.2f}"
          f" {stall * 1e3:>9.1f}", flush=True)  # fmt: skip
    return f"{len(pairs) / lookup_s:,.0f}, {len(pairs) / store_s:,.0f}"


def _look_up(cache: ByteCache, wanted: Pairs) -> list[float]:
    """Return the seconds of each lookup."""
    lookups = []
    for key, _ in wanted:
        began = time.perf_counter()
        found = cache.read(key)
        lookups.append(time.perf_counter() - began)
        if found is None:
            raise ValueError("an entry is missing")
    return lookups


async def _look_up_together(cache: BaseCache, wanted: Pairs, tasks: int) -> list[float]:
    waiting, lookups = iter(wanted), []

    async def look_up() -> None:
        for key, value in waiting:
            began = time.perf_counter()
            found = await cache.get(key)
            lookups.append(time.perf_counter() - began)
            if found != value:
                raise ValueError("an entry is missing")

    await _together(look_up, tasks)
    return lookups


async def _start(folder: Path, options: argparse.Namespace) -> None:
    raw_bytes = _fill(folder, options.entries)
    file_bytes = (folder / DATA).stat().st_size
    rows = [("clean start", await _opening(folder))]
    began = time.perf_counter()
    cache = DiskCache(folder, 64 * GIB)
    found = cache.statistics()
    used_bytes = 0 if found is None else found.used_bytes
    hottest = sum(1 for _, _ in zip(range(10_000), cache.hottest(), strict=False))
    rows.append((f"the {hottest:,} hottest", time.perf_counter() - began))
    await cache.close()
    Marks(folder).mark_open(syncs=True)
    rows.append(("start after a kill", await _opening(folder)))
    (folder / CLEAN).unlink()
    rows.append(("start with verifying", await _opening(folder)))
    each = [size / options.entries for size in (raw_bytes, used_bytes, file_bytes)]
    print(f"\n{options.entries:,} entries; bytes each: {each[0]:,.0f} in the answer,"
          f" {each[1]:,.0f} in pages that are used, {each[2]:,.0f} in the file")  # fmt: skip
    for name, seconds in rows:
        print(f"{name:<20} {seconds:>8.3f} s")


async def _opening(folder: Path) -> float:
    """Return the seconds until the first lookup is answered with a hit."""
    began = time.perf_counter()
    cache = DiskCache(folder, 64 * GIB)
    await cache.opened()
    if cache.read(_key(0)) is None:
        raise ValueError("an entry is missing")
    took = time.perf_counter() - began
    await cache.close()
    return took


def _fill(folder: Path, entries: int) -> int:
    """Make a file that was closed cleanly; return the bytes of its answers."""
    answers = [_answer(number) for number in range(2000)]
    recovery = Recovery(folder, 64 * GIB, time.time)
    recovery.try_exclusive()
    file = DiskFile(folder, 64 * GIB, sync=False)
    raw_bytes, expires_at = 0, time.time() + 86400
    for start in range(0, entries, BATCH):
        batch = []
        for number in range(start, min(start + BATCH, entries)):
            value = answers[number % len(answers)]
            raw_bytes += len(value)
            batch.append(Change(_key(number), value, expires_at))
        file.write(batch, ())
        if sys.stderr.isatty() or start % 100_000 == 0:
            print(f"\rfilling: {start + len(batch):,} of {entries:,}", end="", file=sys.stderr)
    print(file=sys.stderr)
    file.close()
    recovery.release(closed=True)
    return raw_bytes


async def _together(work: Callable[[], Awaitable[None]], tasks: int) -> None:
    await asyncio.gather(*(work() for _ in range(tasks)))


async def _longest_stall(work: Callable[[], Awaitable[None]]) -> float:
    """Do the work; return by how many seconds the loop was late at most."""
    task, longest = asyncio.ensure_future(work()), 0.0
    while not task.done():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - began - 0.001)
    await task
    return longest


def _key(number: int) -> str:
    return digest(b"%d" % number)


def _answer(number: int) -> bytes:
    begin, length = number * 7919 % (len(TEXT) - 4000), 200 + number * 104729 % 3600
    content = TEXT[begin : begin + length]
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": number % 999, "completion_tokens": len(content) // 5}
    made = orjson.dumps({"object": "chat.completion", "choices": [choice], "usage": usage})
    # A copy, as tiers hold: what orjson gives keeps its room to grow, four times what it is.
    return bytes(memoryview(made))


def _at(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


if __name__ == "__main__":
    sys.exit(main())
