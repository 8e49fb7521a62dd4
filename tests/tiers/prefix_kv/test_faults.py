"""Failing disks, damage, truncation, foreign files, locks: an error or a miss, never wrong bytes.

What may crash runs in a process of its own.
"""

import errno
import fcntl
import os
import random
import shutil
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import pytest

from tests.tiers.child import Child
from tests.tiers.prefix_kv.blocks import (
    LARGEST,
    ROOMY,
    SCOPE,
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
from tiers.encryption import TAG_BYTES
from tiers.file_locks import set_lock
from tiers.prefix_kv import folder as folder_module
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES, DamagedBlockError
from tiers.prefix_kv.folder import MAX_DEATHS, OWNERS, Folder
from tiers.prefix_kv.index import index_file
from tiers.prefix_kv.index.index_file import (
    INDEX,
    FileLimits,
    ForeignIndexError,
    ReplacedIndexError,
)
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.store import Location, PrefixStore
from tiers.purges.table import PurgeTable

FLIPS = 300
NOBODY = 65534
KEY = bytes(32)
PATHS = [(number, *range(5)) for number in range(12)]
BLOCKS = 6 * len(PATHS)
SMALL = 3000


@pytest.fixture
def store(tmp_path):
    made = opened(tmp_path)
    yield made
    made.close()


def then() -> float:
    return 1e9


def fill(folder: Path, key: bytes | None = None, **more) -> None:
    store = opened(folder, key=key, **more)
    for path in PATHS:
        store_chain(store, chain_of(*path), size=SMALL)
    store.close()


def in_child(work, *args: object) -> tuple[list[object], int | None]:
    """Return what work sent, and how its process ended."""
    with Child(work, *args) as child:
        sent = list(child.receive())
        child.process.join(HANGS_S)
        return sent, child.process.exitcode


# The disk fails.


class FailingDisk:
    """Replaces `os.pwrite` for one file: fails after some calls, or writes little at a time."""

    def __init__(self, file: int, calls: int, number: int, most: int = 2**30) -> None:
        self.file, self.calls, self.number, self.most = file, calls, number, most
        self.pwrite = os.pwrite

    def __call__(self, file: int, data: memoryview, offset: int) -> int:
        if file != self.file:
            return self.pwrite(file, data, offset)
        self.calls -= 1
        if self.calls < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.pwrite(file, data[: self.most], offset)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_write_that_fails_stores_nothing_and_loses_no_pages(
    store, monkeypatch, number: int, calls: int
) -> None:
    store_chain(store, chain_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", FailingDisk(store.data._file, calls, number))
        with pytest.raises(OSError, match=os.strerror(number)):
            store_chain(store, chain_of(1, 2, 3))
    assert store.statistics().blocks == 1
    check_store(store, ROOMY)
    assert store.statistics().free_bytes == 0
    assert store_chain(store, chain_of(1, 2, 3)).stored == 3
    assert found(store, chain_of(1, 2, 3)) == 3


def test_writes_and_reads_that_stop_short_are_continued(store, monkeypatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "pwrite", FailingDisk(store.data._file, 10_000, 0, most=700))
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: preadv(file, [parts[0][:900]], at))
    store_chain(store, chain_of(1, 2))
    assert found(store, chain_of(1, 2)) == 2


def test_a_read_that_fails_is_an_error_and_removes_nothing(store, monkeypatch) -> None:
    store_chain(store, chain_of(1))
    (block,) = store.index.lookup(chain_of(1))

    def fails(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        with pytest.raises(OSError, match="Input/output"):
            read(store, block)
    assert found(store, chain_of(1)) == 1


def test_pages_that_could_not_be_given_back_are_given_back_later(store, monkeypatch) -> None:
    def fails(*args: object) -> int:
        raise lmdb.DiskError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.index, "publish", fails)
        patch.setattr(store.index, "cancel", fails)
        with pytest.raises(lmdb.DiskError):
            store_chain(store, chain_of(1, 2))
        with pytest.raises(lmdb.DiskError):
            store_chain(store, chain_of(1, 2))
    assert store_chain(store, chain_of(3), size=PAGE_BYTES).stored == 1
    check_store(store, ROOMY)
    assert store.statistics().block_bytes == PAGE_BYTES


def test_a_full_index_recovers_from_a_reader_that_died(tmp_path) -> None:
    """Its snapshot keeps pages from being used again."""
    limits = FileLimits(512 * 1024, 4096)
    with Child(read_for_ever, tmp_path, limits) as child:
        assert child.connection.recv() == "reading"
        store = opened(tmp_path, limits)
        with pytest.raises(lmdb.MapFullError):
            [store_chain(store, chain_of(number), size=1) for number in range(1000)]
    # The first write notices, and from the second on there is room.
    for number in range(3):
        try:
            store_chain(store, chain_of("new", number), size=1)
        except lmdb.MapFullError:
            assert number == 0
    assert found(store, chain_of("new", 2)) == 2
    check_store(store, limits)
    store.close()


def read_for_ever(connection: Connection, folder: Path, limits: FileLimits) -> None:
    store = opened(folder, limits)
    with store.index._file.reading():
        connection.send("reading")
        connection.recv()


# Files are cut off.


def test_a_data_file_cut_off_under_a_reader_is_damage_of_its_blocks(store, tmp_path) -> None:
    store_chain(store, chain_of(1, 2, 3))
    blocks = store.index.lookup(chain_of(1, 2, 3))
    os.truncate(tmp_path / DATA, LARGEST + 10)
    assert read(store, blocks[0]) == content_of(chain_of(1), 0)
    for block in blocks[1:]:
        with pytest.raises(DamagedBlockError, match="ends"):
            read(store, block)
    assert store.discard(Location.of(blocks[1]))
    assert not store.discard(Location.of(blocks[1]))
    assert found(store, chain_of(1, 2, 3)) == 1


def cut_index(connection: Connection, folder: Path, size: int, is_open: bool) -> None:
    if not is_open:
        os.truncate(folder / INDEX, size)
    store = opened(folder)
    if is_open:
        os.truncate(folder / INDEX, size)
        block = NewBlock(chain_of("new"), 0, 1, 2, 0)
        for use in (
            lambda: store.index.lookup(chain_of(*PATHS[0])),
            store.statistics,
            lambda: store.index.reserve([block]),
            lambda: list(store.index.hottest([SCOPE])),
            store.index.counters,
            lambda: store.index.merge_purges(PurgeTable().with_purge(1, "all")),
        ):
            with pytest.raises(lmdb.Error):
                use()
        store.close()
        store = opened(folder)
    connection.send([found(store, chain_of(*path)) for path in PATHS])
    assert store_chain(store, chain_of(1, 2)).stored == 2
    check_store(store, ROOMY)
    store.close()
    connection.send("closed")


@pytest.mark.parametrize("size", [0, 100, PAGE_BYTES, 2 * PAGE_BYTES, 5 * PAGE_BYTES])
@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
def test_a_cut_index_is_an_error_and_never_kills(tmp_path, size: int, is_open: bool) -> None:
    fill(tmp_path)
    sent, status = in_child(cut_index, tmp_path, size, is_open)
    assert sent == [[0] * len(PATHS), "closed"]
    assert status == 0


# Bits are flipped.


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_flipped_bit_in_a_block_is_found(tmp_path, key) -> None:
    fill(tmp_path, key)
    store = opened(tmp_path, key=key)
    blocks = {extent[0]: block for block in store.index.blocks() for extent in block.extents}
    overhead = TAG_BYTES if key else 0
    chance, damaged = random.Random(7), 0
    with (tmp_path / DATA).open("r+b", buffering=0) as file:
        size = (tmp_path / DATA).stat().st_size
        for _ in range(FLIPS):
            at, bit = chance.randrange(size), 1 << chance.randrange(8)
            held = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([held[0] ^ bit]), at)
            block, offset = blocks[at // PAGE_BYTES], at % PAGE_BYTES
            if offset < block.size + overhead:
                damaged += 1
                with pytest.raises(DamagedBlockError):
                    read(store, block)
            else:
                assert len(read(store, block)) == block.size
            os.pwrite(file.fileno(), held, at)
            assert len(read(store, block)) == block.size
    assert FLIPS / 2 < damaged < FLIPS
    store.close()


def use_all(connection: Connection, folder: Path) -> None:
    """Do everything that an engine does; `found` compares all bytes."""
    store = opened(folder, clock=then)
    count = sum(found(store, chain_of(*path)) for path in PATHS)
    keys = [[chain_of(*path).key(at) for at in range(6)] for path in PATHS]
    for use in (
        lambda: store.index.touch([(each, [3] * 6) for each in keys]),
        lambda: store_chain(store, chain_of("new", 1, 2), size=SMALL),
        lambda: [store.index.chain_to(key) for key, _ in store.index.hottest([SCOPE])],
        lambda: store.index.save({("m", "hits"): 1.0}, {SCOPE: lambda _: b"sketch"}),
        lambda: store.index.sweep(b"", 1000),
        lambda: list(store.index.blocks()),
        store.index.counters,
        store.index.scopes,
    ):
        try:
            use()
        except lmdb.Error:
            # The file is damaged; what is found must be right all the same.
            count = min(count, BLOCKS - 1)
    count = min(count, sum(found(store, chain_of(*path)) for path in PATHS))
    connection.send(count)
    store.close()


def try_all(connection: Connection, folder: Path) -> None:
    index_file._SKIPPED = 1
    try:
        use_all(connection, folder)
    except (lmdb.Error, OSError) as exc:
        connection.send(str(exc))
        os._exit(0)


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_in_the_index_never_gives_wrong_bytes(
    memory: Path, monkeypatch, seed: int
) -> None:
    """LMDB may crash on a damaged page, but not for ever: the index is verified after a few deaths.

    Half of the flips are in the first bytes of pages, where they do most harm. Each run of the test
    damages the same bytes, which neither the time nor the first number of a block changes.
    """
    monkeypatch.setattr(index_file, "_SKIPPED", 1)
    fill(memory / "whole", clock=then)
    size = (memory / "whole" / INDEX).stat().st_size
    chance = random.Random(seed)
    for number in range(FLIPS // 10):
        folder = memory / f"{number}"
        shutil.copytree(memory / "whole", folder)
        at = chance.randrange(size)
        if number % 2:
            at = at // PAGE_BYTES * PAGE_BYTES + chance.randrange(64)
        with (folder / INDEX).open("r+b", buffering=0) as file:
            held = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([held[0] ^ 1 << chance.randrange(8)]), at)
        deaths = 0
        while True:
            sent, status = in_child(try_all, folder)
            if status == 0:
                break
            # By a signal, and not by wrong bytes, which would be an exception.
            assert status is not None
            assert status < 0
            deaths += 1
            assert deaths <= MAX_DEATHS
        assert len(sent) == 1
        shutil.rmtree(folder)


def test_an_index_that_kills_is_begun_anew_after_a_few_deaths(tmp_path) -> None:
    fill(tmp_path)
    for _ in range(MAX_DEATHS):
        die(opened(tmp_path))
    # It is verified, and nothing is wrong with it.
    store = opened(tmp_path)
    assert found(store, chain_of(*PATHS[0])) == 6
    store.close()
    with (tmp_path / INDEX).open("r+b") as file:
        for page in range(2, (tmp_path / INDEX).stat().st_size // PAGE_BYTES):
            file.seek(page * PAGE_BYTES + 12)
            file.write(b"\xff" * 4)
    (tmp_path / OWNERS).write_bytes(bytes([1, MAX_DEATHS, 0]))
    store = opened(tmp_path)
    assert store.statistics().blocks == 0
    store.close()
    assert (tmp_path / OWNERS).read_bytes()[:3] == bytes([1, 0, 0])


def open_and_end(connection: Connection, folder: Path, is_killed: bool) -> None:
    opened(folder)
    if is_killed:
        os.abort()


def test_only_a_process_that_does_not_end_by_itself_has_died(tmp_path) -> None:
    for _ in range(MAX_DEATHS):
        assert in_child(open_and_end, tmp_path, False) == ([], 0)
    assert not is_suspect(tmp_path)
    for _ in range(MAX_DEATHS):
        assert in_child(open_and_end, tmp_path, True) == ([], -signal.SIGABRT)
    assert is_suspect(tmp_path)


def is_suspect(path: Path) -> bool:
    folder = Folder(path)
    with folder.writing():
        folder.join()
    may_kill = folder.may_kill
    folder.leave()
    return may_kill


def test_damage_of_what_is_beside_blocks_is_noticed(tmp_path) -> None:
    for name, value in ((b"state", b"x" * 49), (b"purges", b"x" * 99)):
        fill(tmp_path)
        store = opened(tmp_path)
        with store.index._file.writing() as write:
            write.txn.put(name, value, db=write.dbs.meta)
            write._was = write.state
        with pytest.raises(lmdb.CorruptedError):
            store.index.lookup(chain_of(*PATHS[0]))
        store.close()
        store = opened(tmp_path)
        assert store.statistics().blocks == 0
        store.close()


def test_a_damaged_record_is_stored_anew_and_its_pages_are_found(tmp_path) -> None:
    limits = FileLimits(1024**2, 8)
    store = opened(tmp_path, limits)
    store_chain(store, chain_of(1, 2, 3), requests=2, size=SMALL)
    key = chain_of(1, 2).key(1)
    with store.index._file.writing() as write:
        record = write.txn.get(key, db=write.dbs.blocks)
        write.txn.put(key, record[:-1] + b"?", db=write.dbs.blocks)
    assert found(store, chain_of(1, 2, 3)) == 1
    assert store_chain(store, chain_of(1, 2, 3), requests=2, size=SMALL).stored == 1
    assert found(store, chain_of(1, 2, 3)) == 3
    assert store.index.sweep(b"", 100) == b""
    assert store.statistics().block_bytes == 3 * PAGE_BYTES
    # The order still has the row of the record that was, which evicts nothing when its turn comes.
    keys = [chain_of(1, 2, 3).key(at) for at in range(3)]
    store.index.touch([(keys, [9] * 3)])
    for number in range(3):
        store_chain(store, chain_of("new", number), requests=2, size=SMALL)
    assert store_chain(store, chain_of("new", 3, 4), requests=5, size=SMALL).evicted == 1
    assert found(store, chain_of(1, 2, 3)) == 3
    check_store(store, limits)
    store.close()


# Files of others, and locks.


def test_files_of_other_programs_are_left_alone(tmp_path) -> None:
    text, data, other = tmp_path / "text", tmp_path / "data", tmp_path / "other"
    for folder in (text, data, other):
        folder.mkdir()
    (text / INDEX).write_text("index of maps, measured distances and bearings\n" * 400)
    (data / DATA).write_bytes(b"blocks of a building")
    with (
        lmdb.open(str(other / INDEX), subdir=False, max_dbs=2) as env,
        env.begin(write=True) as txn,
    ):
        txn.put(b"meta", b"a value of another program")
    for folder in (text, data, other):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ForeignIndexError):
            opened(folder)
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name: after[name] for name in before if "lock" not in name} == {
            name: content for name, content in before.items() if "lock" not in name
        }


def test_a_folder_whose_index_was_deleted_begins_anew(tmp_path) -> None:
    fill(tmp_path)
    (tmp_path / INDEX).unlink()
    store = opened(tmp_path)
    assert found(store, chain_of(*PATHS[0])) == 0
    assert store_chain(store, chain_of(*PATHS[0])).stored == 6
    store.close()


def test_another_format_begins_anew(tmp_path) -> None:
    fill(tmp_path)
    store = opened(tmp_path)
    with store.index._file.writing() as write:
        write.put_meta(b"format", b"0")
    store.close()
    (tmp_path / OWNERS).unlink()
    store = opened(tmp_path)
    assert store.statistics().blocks == 0
    store.close()


def test_an_index_whose_names_are_damaged_begins_anew(tmp_path) -> None:
    fill(tmp_path)
    damaged = (tmp_path / INDEX).read_bytes().replace(b"meta", b"neta")
    (tmp_path / INDEX).write_bytes(damaged)
    store = opened(tmp_path)
    assert store.statistics().blocks == 0
    store.close()


def test_an_index_beyond_a_smaller_limit_begins_anew(tmp_path) -> None:
    fill(tmp_path)
    size = (tmp_path / INDEX).stat().st_size // PAGE_BYTES * PAGE_BYTES
    store = opened(tmp_path, FileLimits(size - PAGE_BYTES, 100))
    assert store.statistics().blocks == 0
    assert (tmp_path / INDEX).stat().st_size < size
    store.close()


def test_who_has_a_replaced_store_open_is_told(tmp_path) -> None:
    with Child(use_when_told, tmp_path) as child:
        assert child.connection.recv() == 1
        (tmp_path / INDEX).unlink()
        store = opened(tmp_path)
        child.connection.send("go on")
        assert child.connection.recv() == "replaced"
        assert found(store, chain_of(1)) == 0
        store.close()


def use_when_told(connection: Connection, folder: Path) -> None:
    store = opened(folder)
    store_chain(store, chain_of(1))
    connection.send(found(store, chain_of(1)))
    connection.recv()
    try:
        store.index.lookup(chain_of(1))
    except ReplacedIndexError:
        connection.send("replaced")
    store.close()


def open_as_nobody(connection: Connection, folder: Path) -> None:
    if os.getuid() == 0:
        os.setuid(NOBODY)
    try:
        opened(folder)
    except OSError as exc:
        connection.send(exc.errno)


def test_a_folder_that_may_not_be_written_is_an_error() -> None:
    # Nobody may enter those of pytest.
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        folder = Path(made)
        folder.chmod(0o555)
        assert in_child(open_as_nobody, folder) == ([errno.EACCES], 0)


def test_a_lock_that_is_not_given_up_is_an_error_and_reads_go_on(
    store, tmp_path, monkeypatch
) -> None:
    store_chain(store, chain_of(1))
    monkeypatch.setattr(folder_module, "LOCK_WAIT_S", 0.01)
    file = os.open(tmp_path / OWNERS, os.O_RDWR)
    set_lock(file, fcntl.F_WRLCK, folder_module._LOCK)
    with pytest.raises(TimeoutError, match="locked"):
        store_chain(store, chain_of(2))
    with pytest.raises(TimeoutError, match="locked"):
        PrefixStore(store.config, limits=ROOMY)
    assert found(store, chain_of(1)) == 1
    os.close(file)
    assert store_chain(store, chain_of(2)).stored == 1
