"""Kills with -9 while blocks are stored, by one process and by two at once.

Short by default; with TIERSERVE_LONG=1 it takes 50 kills.
"""

import os
import random
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.tiers.child import Child
from tests.tiers.prefix_kv.blocks import (
    chain_of,
    check_store,
    content_of,
    die,
    found,
    opened,
    read,
    store_chain,
)
from tests.waiting import HANGS_S
from tiers.prefix_kv import folder as folder_module
from tiers.prefix_kv.data_file import PAGE_BYTES
from tiers.prefix_kv.folder import MAX_DEATHS
from tiers.prefix_kv.index import index_file, snapshot
from tiers.prefix_kv.index.index_file import FileLimits
from tiers.prefix_kv.maintenance import verify
from tiers.prefix_kv.record import StoredBlock

KILLS = 50 if os.environ.get("TIERSERVE_LONG") == "1" else 10
VAST = FileLimits(64 * 1024**2, 2**20)
"""However many blocks are stored until the kill, none is evicted."""
TIGHT = FileLimits(1024**2, 60)
MOST_READ = 8
"""Records that opening may read, however many there are."""


def path_of(number: int) -> tuple[int, int, int]:
    return number // 4, number // 2, number


def store_for_ever(connection: Connection, folder: Path, limits: FileLimits, start: int) -> None:
    folder_module.LOCK_WAIT_S = HANGS_S
    store = opened(folder, limits)
    for number in range(start, start + 10_000):
        stored = store_chain(store, chain_of(*path_of(number)), requests=2)
        store.index.touch([([chain_of(*path_of(number)).key(at) for at in range(3)], [2] * 3)])
        connection.send((number, stored.stored))


@pytest.mark.parametrize("limits", [VAST, TIGHT], ids=["roomy", "evicting"])
@pytest.mark.parametrize("writers", [1, 2])
def test_a_kill_leaves_a_store_that_is_whole(tmp_path, limits: FileLimits, writers: int) -> None:
    chance = random.Random(writers)
    acknowledged: set[int] = set()
    for kill in range(KILLS):
        children = [
            Child(store_for_ever, tmp_path, limits, kill * 20_000 + each * 10_000)
            for each in range(writers)
        ]
        for child in children:
            for _ in range(chance.randrange(1, 30)):
                acknowledged.add(child.connection.recv()[0])
        for child in children:
            child.process.kill()
        for child in children:
            acknowledged |= {number for number, _ in child.receive()}
            child.process.join()
        store = opened(tmp_path, limits)
        check_store(store, limits)
        blocks = {block.key: block for block in store.index.blocks()}
        for number in acknowledged:
            chain = chain_of(*path_of(number))
            for at in range(3):
                if (block := blocks.get(chain.key(at))) is not None:
                    assert read(store, block) == content_of(chain, at, block.size)
            assert limits is TIGHT or found(store, chain) == 3
        assert verify(store) == (len(blocks), 0)
        pages = sum(pages for block in blocks.values() for _, pages in block.extents)
        statistics = store.statistics()
        # No reservation is left, so all pages are those of blocks, or free.
        assert statistics.block_bytes == pages * PAGE_BYTES
        (store.close if kill % (2 * MAX_DEATHS) else partial(die, store))()


def test_opening_reads_a_few_records_however_many_there_are(tmp_path, monkeypatch) -> None:
    counts: dict[str, int] = {"records": 0, "transactions": 0}
    unpack, begin = StoredBlock.unpack, snapshot.Snapshot.__init__

    def counting_unpack(key: bytes, record: bytes) -> StoredBlock:
        counts["records"] += 1
        return unpack(key, record)

    def counting_begin(self, *args: object) -> None:
        counts["transactions"] += 1
        begin(self, *args)

    with Child(store_for_ever, tmp_path, VAST, 0) as child:
        while child.connection.recv()[0] < 100:
            pass
    monkeypatch.setattr(StoredBlock, "unpack", counting_unpack)
    monkeypatch.setattr(snapshot.Snapshot, "__init__", counting_begin)
    monkeypatch.setattr(index_file, "page_problems", lambda _: pytest.fail("pages are verified"))
    store = opened(tmp_path, VAST)
    assert counts["records"] <= MOST_READ
    assert counts["transactions"] == 1
    assert store.statistics().blocks >= 100
    store.close()
