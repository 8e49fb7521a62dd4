"""Each scope has an equal part of a tier for sure, however others use theirs."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.memory.test_memory import EVERY, run
from tiers import DiskCache, MemoryCache
from tiers.backend import ByteCache
from tiers.disk import Durability
from tiers.disk.record_format import NO_SCOPE, pack_scope_bytes, scope_of, unpack_scope_bytes
from tiers.disk.verify import verify
from tiers.key import digest, is_key, scope_named, scoped
from tiers.key import scope_of as scope_of_key

MIB = 1024 * 1024
SCOPES = [scope_named(name) for name in (b"a", b"b", b"c")]
A, B, C = SCOPES
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*SCOPES, ""]),
        st.integers(0, 30),
        st.integers(0, 3000),
        st.sampled_from(["set", "set", "get", "delete"]),
    ),
    max_size=200,
)


def key_in(scope: str, number: int) -> str:
    return scoped(scope, digest(b"%d" % number))


def taken(cache: ByteCache) -> Counter[str]:
    """Return how many entries each scope has."""
    return Counter(scope_of_key(key) for key in cache.keys())  # noqa: SIM118


def test_a_key_says_whose_it_is() -> None:
    key = key_in(A, 1)
    assert is_key(key)
    assert key.startswith(A)
    assert scope_of(key.encode()) == A.encode()
    assert scope_of(digest(b"1").encode()) == NO_SCOPE
    assert scope_of(b"short") == NO_SCOPE
    assert len(set(SCOPES)) == 3


@EVERY
@given(steps=STEPS)
def test_what_leaves_memory_was_beyond_its_share(policy: str, steps) -> None:
    held: dict[str, int] = {}

    def note(key: str, value: bytes, expires_at: float | None) -> None:
        sizes: Counter[str] = Counter()
        for each, size in held.items():
            sizes[scope_of_key(each)] += size
        del sizes[""]
        scope = scope_of_key(key)
        assert not scope or sizes[scope] * len(sizes) >= sizes.total()
        del held[key]

    cache = MemoryCache(20_000, policy=policy, on_evict=note)
    for scope, number, size, action in steps:
        key = key_in(scope, number)
        if action == "get":
            assert (cache.read(key) is not None) == (key in held)
        elif action == "delete":
            assert run(cache.remove(key)) == (key in held)
            held.pop(key, None)
        else:
            held[key] = cache._cost(key, size)
            assert run(cache.write(key, bytes(size), None)) == (key in held)
        assert cache.usage.bytes <= 20_000
        assert {key: cache._cost(key, len(value)) for key, value, _ in cache.entries()} == held


@EVERY
def test_who_floods_memory_takes_nobody_elses_share(policy: str) -> None:
    cache = MemoryCache(125_000, policy=policy)
    theirs = [key_in(B, number) for number in range(15)]
    for key in theirs:
        run(cache.write(key, bytes(1000), None))
    for number in range(1000):
        for _ in range(3):
            if cache.read(key_in(A, number)) is None:
                run(cache.write(key_in(A, number), bytes(1000), None))
    assert all(cache.peek(key) for key in theirs)
    # What nobody else needs is A's.
    assert taken(cache)[A] > 30
    for number in range(1000):
        run(cache.write(key_in(C, number), bytes(1000), None))
    assert all(cache.peek(key) for key in theirs)
    assert taken(cache)[A] > 15


def test_what_would_leave_is_beyond_its_share() -> None:
    cache = MemoryCache(20_000, policy="lru")
    run(cache.write(key_in(B, 0), bytes(1000), None))
    for number in range(30):
        run(cache.write(key_in(A, number), bytes(1000), None))
    assert (victim := cache.victim(10_000)) is not None
    assert victim.startswith(A)
    run(cache.write(key_in(A, 99), bytes(1000), None))
    assert cache.peek(victim) is None
    assert cache.peek(key_in(B, 0)) is not None


async def test_who_floods_the_disk_takes_nobody_elses_share(tmp_path: Path) -> None:
    # What A asks for is worth a thousand times more.
    cache = DiskCache(
        tmp_path,
        MIB,
        durability=Durability.OS,
        worth=lambda key, size: 1000 if key.startswith(A) else 1,
    )
    theirs = [key_in(B, number) for number in range(100)]
    for key in theirs:
        await cache.set(key, bytes(1000))
    for number in range(2000):
        await cache.set(key_in(A, number), bytes(1000))
    assert all(cache.peek(key) for key in theirs)
    assert taken(cache)[A] > 150
    # B may have as much as A, whatever it is worth.
    for number in range(2000):
        await cache.set(key_in(B, number), bytes(1000))
    entries = taken(cache)
    assert entries[A] > 100
    assert entries[B] > 100
    hottest = [key for key, _, _ in cache.hottest() if key.startswith(A)]
    assert hottest == [key_in(A, 1999 - number) for number in range(entries[A])]
    ranks = [rank for rank, _ in cache.ranked_keys()]
    assert ranks == sorted(ranks, reverse=True)
    assert len(ranks) == entries.total()
    assert [rank for rank, _ in cache.ranked_keys(ranks[99])] == ranks[100:]
    await cache.close()


@given(STEPS)
@settings(max_examples=30)
async def test_what_leaves_the_disk_was_beyond_its_share(steps) -> None:
    with TemporaryDirectory() as folder:
        cache = DiskCache(Path(folder), MIB, durability=Durability.OS)
        held: dict[str, int] = {}
        for scope, number, size, action in steps:
            key = key_in(scope, number)
            if action == "delete":
                await cache.remove(key)
                held.pop(key, None)
            elif action == "set":
                await cache.set(key, bytes(20 * size))
                held[key] = 20 * size
            left = held.keys() - set(cache.keys())
            sizes: Counter[str] = Counter()
            for each, bytes_ in held.items():
                sizes[each[:8]] += bytes_ if "." in each else 0
            for each in left:
                # Several leave at once, and smaller ones may have gone with their scope before.
                assert "." not in each or sizes[each[:8]] * 3 >= sizes.total() * 0.7
                del held[each]
        await cache.close()
        assert verify(Path(folder)).damaged == 0
        with lmdb.open(folder, max_dbs=10) as env:
            assert counted(env) == real(env)


def counted(env: lmdb.Environment) -> dict[bytes, int]:
    with env.begin() as txn:
        scopes = env.open_db(b"scopes", txn=txn, create=False)
        return {key: unpack_scope_bytes(key, memoryview(row)) for key, row in txn.cursor(db=scopes)}


def real(env: lmdb.Environment) -> dict[bytes, int]:
    held: Counter[bytes] = Counter()
    with env.begin() as txn:
        entries = env.open_db(b"entries", txn=txn, create=False)
        for key, record in txn.cursor(db=entries):
            held[scope_of(key)] += len(record)
    del held[NO_SCOPE]
    return dict(held)


@pytest.mark.parametrize("row", [None, b"", b"\xff" * 12, pack_scope_bytes(A.encode(), 2**60)])
async def test_what_scopes_hold_is_counted_again_in_a_damaged_file(tmp_path: Path, row) -> None:
    cache = DiskCache(tmp_path, MIB, durability=Durability.OS)
    for number in range(20):
        await cache.set(key_in(SCOPES[number % 3], number), bytes(500))
    file = cache._file
    with file.env.begin(write=True, db=file.dbs.scopes) as txn:
        txn.delete(A.encode())
        if row is not None:
            txn.put(A.encode(), row)
    # Whatever it says, entries are stored, and leave.
    for number in range(1000):
        assert await cache.set(key_in(SCOPES[number % 3], number), bytes(2000))
    assert cache.usage.bytes <= MIB
    assert cache.usage.evictions > 500
    await cache.close()
    assert verify(tmp_path, repair=True).damaged == 0
    with lmdb.open(str(tmp_path), max_dbs=10) as env:
        assert counted(env) == real(env)
