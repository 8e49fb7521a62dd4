"""Verifying and compacting a store, also one that is in use."""

from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.tiers.child import Child
from tests.tiers.prefix_kv.blocks import (
    LARGEST,
    ROOMY,
    chain_of,
    check_store,
    found,
    opened,
    read,
    store_chain,
)
from tests.waiting import HANGS_S
from tiers.prefix_kv import folder as folder_module
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES, DamagedBlockError
from tiers.prefix_kv.index.index_file import FileLimits
from tiers.prefix_kv.maintenance import compact, verify
from tiers.prefix_kv.store import Location
from tiers.purges.table import ALL

VAST = FileLimits(64 * 1024**2, 2**20)
"""However much one process stores while another stands still, nothing is evicted."""


@pytest.fixture(params=[None, bytes(32)], ids=["plain", "encrypted"])
def store(request, tmp_path):
    made = opened(tmp_path, key=request.param)
    yield made
    check_store(made, ROOMY)
    made.close()


def remove(store, *path: object) -> None:
    (block,) = store.index.lookup(chain_of(*path))
    assert store.discard(Location.of(block))


def test_damaged_blocks_are_counted_and_with_repair_removed(store, tmp_path) -> None:
    for number in range(4):
        store_chain(store, chain_of(number))
    (block,) = store.index.lookup(chain_of(2))
    with (tmp_path / DATA).open("r+b") as file:
        file.seek(block.extents[0][0] * PAGE_BYTES)
        file.write(b"damage")
    assert verify(store) == (4, 1)
    assert verify(store, repair=True) == (4, 1)
    assert verify(store) == (3, 0)
    assert [found(store, chain_of(number)) for number in range(4)] == [1, 1, 0, 1]


def test_compacting_moves_blocks_down_and_cuts_the_file(store, tmp_path) -> None:
    sizes = [1, LARGEST - 16, 2 * PAGE_BYTES, PAGE_BYTES, 9000]
    for number in range(100):
        store_chain(store, chain_of(number), size=sizes[number % 5])
    for number in range(0, 100, 3):
        remove(store, number)
    before = (tmp_path / DATA).stat().st_size
    saved = compact(store)
    after = (tmp_path / DATA).stat().st_size
    assert saved == before - after > before // 4
    # Less is left free than the last block needs.
    assert store.statistics().free_bytes < LARGEST
    assert [found(store, chain_of(number)) for number in range(100)] == [
        int(number % 3 > 0) for number in range(100)
    ]
    assert compact(store) == 0


def test_compacting_an_empty_store_empties_the_file(store, tmp_path) -> None:
    assert compact(store) == 0
    store_chain(store, chain_of(1))
    remove(store, 1)
    assert compact(store) >= LARGEST - PAGE_BYTES
    assert (tmp_path / DATA).stat().st_size == 0


def test_compacting_removes_what_was_purged(store, tmp_path) -> None:
    for number in range(4):
        store_chain(store, chain_of(number))
    store.index.purge([ALL])
    assert compact(store) > 0
    assert (tmp_path / DATA).stat().st_size == 0
    assert verify(store) == (0, 0)


def test_who_reads_where_a_block_was_finds_it_damaged_and_it_stays(store) -> None:
    for number in range(4):
        store_chain(store, chain_of(number))
    (stale,) = store.index.lookup(chain_of(3))
    remove(store, 0)
    compact(store)
    with pytest.raises(DamagedBlockError):
        read(store, stale)
    assert not store.discard(Location.of(stale))
    assert found(store, chain_of(3)) == 1


def test_a_move_that_fails_leaves_all_as_it_was(store, monkeypatch) -> None:
    for number in range(4):
        store_chain(store, chain_of(number))
    remove(store, 0)

    def fails(*args: object) -> int:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store.data, "copy", fails)
        with pytest.raises(OSError, match="Input/output"):
            compact(store)
    assert [found(store, chain_of(number)) for number in range(4)] == [0, 1, 1, 1]
    check_store(store, ROOMY)


def store_and_remove(connection: Connection, folder: Path) -> None:
    folder_module.LOCK_WAIT_S = HANGS_S
    store = opened(folder, VAST)
    connection.send("open")
    for number in count():
        store_chain(store, chain_of(number), size=PAGE_BYTES * (1 + number % 5))
        if number % 2:
            remove(store, number - 1)
        if connection.poll():
            break
    connection.send(number)
    store.close()
    connection.send("closed")


def test_compacting_goes_on_beside_a_process_that_stores(tmp_path) -> None:
    with Child(store_and_remove, tmp_path) as child:
        assert child.connection.recv() == "open"
        store = opened(tmp_path, VAST)
        for _ in range(8):
            compact(store)
            assert verify(store).damaged == 0
        child.connection.send("stop")
        last = child.connection.recv()
        assert child.connection.recv() == "closed"
    check_store(store, VAST)
    kept = [number for number in range(last + 1) if number % 2]
    assert [found(store, chain_of(number)) for number in kept] == [1] * len(kept)
    compact(store)
    assert (tmp_path / DATA).stat().st_size <= store.statistics().block_bytes + LARGEST
    store.close()
