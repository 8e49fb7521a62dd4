"""Free pages against a model: a set of pages."""

from itertools import pairwise
from pathlib import Path

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.prefix_kv.index.extents import FreePages, gaps, pack_extent

LIMIT = 60


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("extents")
    with lmdb.open(str(folder), max_dbs=1, map_size=2**20) as opened:
        yield opened


def pages_of(extents) -> set[int]:
    found = [page for first, pages in extents for page in range(first, first + pages)]
    assert len(found) == len(set(found))
    return set(found)


def free_extents(free: FreePages) -> list[tuple[int, int]]:
    rows = free._txn.cursor(db=free._db)
    return [(int.from_bytes(first), int.from_bytes(pages)) for first, pages in rows]


STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 25), st.randoms(use_true_random=False)))


@given(STEPS)
def test_pages_are_taken_once_and_none_is_lost(env, steps) -> None:
    db = env.open_db(b"free")
    with env.begin(write=True) as txn:
        txn.drop(db, delete=False)
        free = FreePages(txn, db, 0, LIMIT, 0)
        held: list[list[tuple[int, int]]] = []
        for takes, pages, chance in steps:
            taken = pages_of(extent for extents in held for extent in extents)
            if takes:
                has_room = pages <= LIMIT - len(taken)
                assert free.has(pages) is has_room
                extents = free.take(pages)
                assert (extents is not None) is has_room
                if extents is not None:
                    assert len(pages_of(extents)) == pages
                    assert not pages_of(extents) & taken
                    held.append(extents)
            elif held:
                for extent in held.pop(chance.randrange(len(held))):
                    free.free(extent)
            taken = pages_of(extent for extents in held for extent in extents)
            rest = free_extents(free)
            assert pages_of(rest) == set(range(free.end)) - taken
            assert free.pages == len(pages_of(rest))
            assert free.end == max(taken, default=-1) + 1
            assert (rest, free.end) == gaps([extent for extents in held for extent in extents])
            # Neighbours are joined, so a block gets as few extents as there can be.
            assert all(first + pages < after for (first, pages), (after, _) in pairwise(rest))
        txn.abort()


def test_a_smaller_limit_refuses_pages_behind_it(env) -> None:
    db = env.open_db(b"free")
    with env.begin(write=True) as txn:
        txn.drop(db, delete=False)
        free = FreePages(txn, db, 10, 5, 0)
        assert not free.has(1)
        free.free((0, 2))
        assert free.take(3) is None
        assert free.take(2) == [(0, 2)]
        txn.abort()


@pytest.mark.parametrize(
    ("extent", "held"),
    [((4, 2), (5, 3)), ((4, 2), (2, 3)), ((4, 2), (4, 2)), ((9, 3), (0, 1))],
    ids=["next", "before", "same", "behind the end"],
)
def test_a_page_that_is_free_twice_is_damage(env, extent, held) -> None:
    db = env.open_db(b"free")
    with env.begin(write=True) as txn:
        txn.drop(db, delete=False)
        txn.put(*pack_extent(held), db=db)
        with pytest.raises(lmdb.CorruptedError):
            FreePages(txn, db, 10, 20, held[1]).free(extent)
        txn.abort()


@pytest.mark.parametrize(
    "row",
    [pack_extent((8, 3)), pack_extent((1, 0)), (b"\0\0\0\1", b"\1"), (b"\1", b"\0\0\0\1")],
    ids=["behind the end", "empty", "short value", "short key"],
)
def test_damaged_free_pages_are_not_taken(env, row) -> None:
    db = env.open_db(b"free")
    with env.begin(write=True) as txn:
        txn.drop(db, delete=False)
        txn.put(*row, db=db)
        with pytest.raises(lmdb.CorruptedError):
            FreePages(txn, db, 10, 20, 3).take(2)
        txn.abort()


def test_fewer_free_pages_than_counted_are_damage(env) -> None:
    db = env.open_db(b"free")
    with env.begin(write=True) as txn:
        txn.drop(db, delete=False)
        with pytest.raises(lmdb.CorruptedError):
            FreePages(txn, db, 10, 10, 5).take(2)
        txn.abort()
