"""The store against a model: whatever happens, what is found is what was stored last."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.tiers.child import Child
from tests.tiers.conftest import Clock
from tests.tiers.prefix_kv.blocks import (
    LARGEST,
    SCOPE,
    chain_of,
    check_store,
    content_of,
    die,
    read,
    store_chain,
)
from tests.tiers.prefix_kv.conftest import MEMORY
from tiers.encryption import TAG_BYTES
from tiers.prefix_kv.data_file import PAGE_BYTES
from tiers.prefix_kv.index.index_file import FileLimits
from tiers.prefix_kv.index.transaction import NewBlock, Reservation
from tiers.prefix_kv.maintenance import compact, verify
from tiers.prefix_kv.record import BlockChain
from tiers.prefix_kv.store import Location, PrefixStore, StoreConfig, Stored
from tiers.purges.table import PurgeTable

LONG = os.environ.get("TIERSERVE_LONG") == "1"
TTL_S = 100.0
STORES = st.sampled_from((0, 1))
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
TENANTS = ("tenant:a", "tenant:b")
DATA_PAGES = (12, 40, 64)


class Opened:
    """A store of this process; LMDB opens a file only once in each."""

    def __init__(self) -> None:
        self.clock = Clock()

    def open(self, folder: Path, limits: FileLimits, key: bytes | None, now: float) -> None:
        self.clock.now = now
        config = StoreConfig(folder, 2**26, key, TTL_S)
        self.store = PrefixStore(config, self.clock, limits=limits)

    def call(self, now: float, function: Callable, *args: object):
        self.clock.now = now
        return function(self.store, *args)


def serve(connection: Connection) -> None:
    """Do what the machine asks for, in a process of its own."""
    opened = Opened()
    while True:
        name, args = connection.recv()
        connection.send(getattr(opened, name)(*args))


class OpenedElsewhere:
    """A store of another process."""

    def __init__(self) -> None:
        self.child = Child(serve)

    def _ask(self, *message: object):
        self.child.connection.send(message)
        return self.child.connection.recv()

    def open(self, *args: object) -> None:
        self._ask("open", args)

    def call(self, *args: object):
        return self._ask("call", args)


@pytest.fixture(scope="module", autouse=True)
def elsewhere() -> Iterator[None]:
    made = OpenedElsewhere()
    with made.child:
        StoreMachine.both = (Opened(), made)
        yield


def served(store: PrefixStore) -> dict[bytes, int]:
    """Return the numbers of the blocks that may be served, by key."""
    with store.index._file.reading() as seen:
        blocks = [seen.served(key) for key in seen.keys_after(b"", 10_000)]
    return {block.key: block.sequence for block in blocks if block is not None}


def reserve(
    store: PrefixStore, chain: BlockChain, requests: int
) -> list[tuple[Reservation, bytes]]:
    """Reserve pages for a chain's last block, and write it there."""
    index, at = store.index, len(chain.names) - 1
    new = NewBlock(chain, at, PAGE_BYTES, requests, index.purge_epoch())
    content = memoryview(content_of(chain, at, PAGE_BYTES))
    scratch = memoryview(bytearray(PAGE_BYTES + index.overhead_bytes))
    return [
        (each, store.data.write(each.extents, each.sequence, content, scratch))
        for each in index.reserve([new])[0]
    ]


def look_up(store: PrefixStore, chain: BlockChain) -> list[bytes]:
    """Return the keys that are found; checks the blocks' bytes, and what their records say."""
    blocks = store.index.lookup(chain)
    for at, block in enumerate(blocks):
        assert read(store, block) == content_of(chain, at, block.size)
    if blocks:
        linked = store.index.chain_to(blocks[-1].key)
        assert [block for block, _ in linked] == blocks
        assert [each.tokens for _, each in linked] == [
            name.tokens for name in chain.names[: len(blocks)]
        ]
    return [block.key for block in blocks]


def remove(store: PrefixStore, key: bytes) -> bool:
    """Remove a block as one that was found damaged; where others would be meant, nothing goes."""
    block = store.index.get(key)
    if block is None:
        return False
    location = Location.of(block)
    assert not store.discard(location._replace(sequence=block.sequence + 1))
    assert not store.discard(location._replace(extents=((1, 1), (9999, 3))))
    return store.discard(location)


def parentless(store: PrefixStore) -> set[bytes]:
    """Return the keys of blocks whose parent isn't stored."""
    with store.index._file.reading() as seen:
        blocks = [seen.record(key) for key in seen.keys_after(b"", 10_000)]
        parents = {block.key: SCOPE + seen.details(block).parent for block in blocks if block.depth}
    keys = {block.key for block in blocks}
    return {key for key, parent in parents.items() if parent not in keys}


def sweep(store: PrefixStore, most: int) -> int:
    """Sweep all records; returns how many are left."""
    after = b""
    while after := store.index.sweep(after, most):
        pass
    return len(list(store.index.blocks()))


def lookup(store: PrefixStore, chain: BlockChain) -> list[bytes]:
    return [block.key for block in store.index.lookup(chain)]


def store_with(
    store: PrefixStore, chain: BlockChain, requests: int, size: int, epoch: int
) -> Stored:
    return store_chain(store, chain, requests=requests, size=size, epoch=epoch)


def publish(store: PrefixStore, reserved: tuple[Reservation, bytes]) -> int:
    return store.index.publish([reserved])


def cancel(store: PrefixStore, reserved: tuple[Reservation, bytes]) -> None:
    store.index.cancel([reserved[0]])


def touch(store: PrefixStore, keys: list[bytes], counts: list[int]) -> None:
    store.index.touch([(keys, counts)])


def purge(store: PrefixStore, label: str) -> int:
    """Purge a label; returns the epoch."""
    epoch = store.index.purge_epoch() + 1
    store.index.merge_purges(PurgeTable({label: epoch}))
    return epoch


def purge_epoch(store: PrefixStore) -> int:
    return store.index.purge_epoch()


def free_bytes(store: PrefixStore) -> int:
    return store.statistics().free_bytes


class StoreMachine(RuleBasedStateMachine):
    """Two processes on one folder."""

    both: tuple[Opened, OpenedElsewhere]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.now = 1e6
        self.is_open = False
        self.orphans: set[bytes] = set()
        self.pending: list[tuple[int, tuple[Reservation, bytes]]] = []

    @initialize(data_pages=st.sampled_from(DATA_PAGES), encrypts=st.booleans())
    def begin(self, data_pages: int, encrypts: bool) -> None:
        self.key = bytes(32) if encrypts else None
        self.limits = FileLimits(1024**2, data_pages)
        self._open(0)
        self._open(1)
        self.is_open = True

    def _open(self, number: int) -> None:
        self.both[number].open(self.folder, self.limits, self.key, self.now)

    def _call(self, number: int, function: Callable, *args: object):
        return self.both[number].call(self.now, function, *args)

    def _served(self) -> dict[bytes, int]:
        return self._call(0, served)

    def teardown(self) -> None:
        if self.is_open:
            self._call(0, PrefixStore.close)
            self._call(1, PrefixStore.close)
        shutil.rmtree(self.folder)

    def _chain(self, path: tuple[int, ...]) -> BlockChain:
        # The first step names the tenant, as a salt does.
        return chain_of(*path, labels=("model:m", TENANTS[path[0]]))

    @rule(number=STORES, path=PATHS, requests=st.integers(1, 5), pages=st.integers(1, 5))
    def store(self, number: int, path: tuple[int, ...], requests: int, pages: int) -> None:
        before, chain = self._served(), self._chain(path)
        epoch = self._call(number, purge_epoch)
        size = min(pages * PAGE_BYTES, LARGEST - TAG_BYTES)
        result = self._call(number, store_with, chain, requests, size, epoch)
        after = self._served()
        assert len(after.keys() - before.keys()) == result.stored
        assert len(before.keys() - after.keys()) == result.evicted
        # A block needs one page, or two with a cipher's tag.
        if not result.evicted and not before and pages * 2 * len(path) <= self.limits.data_pages:
            assert self.pending or result.stored == len(path)

    @rule(number=STORES, path=PATHS, requests=st.integers(1, 5))
    def reserve(self, number: int, path: tuple[int, ...], requests: int) -> None:
        reserved = self._call(number, reserve, self._chain(path), requests)
        self.pending += [(number, each) for each in reserved]

    @precondition(lambda self: self.pending)
    @rule(is_published=st.booleans(), chance=st.randoms(use_true_random=False))
    def end_reservation(self, is_published: bool, chance) -> None:
        number, reserved = self.pending.pop(chance.randrange(len(self.pending)))
        before = self._served()
        if is_published:
            stored = self._call(number, publish, reserved)
            assert len(self._served().keys() - before.keys()) == stored
        else:
            self._call(number, cancel, reserved)
            assert self._served() == before

    @rule(number=STORES, path=PATHS)
    def look_up(self, number: int, path: tuple[int, ...]) -> None:
        chain, held = self._chain(path), self._served()
        keys = [chain.key(at) for at in range(len(path))]
        expected = list(takewhile(held.__contains__, keys))
        assert self._call(number, look_up, chain) == expected

    @rule(number=STORES, path=PATHS)
    def look_up_others(self, number: int, path: tuple[int, ...]) -> None:
        """Other tokens or another parent, of the same hash, find nothing; nor do other scopes."""
        chain = self._chain(path)
        last = chain.names[-1]
        for name in (last._replace(tokens=b"x" * 64), last._replace(parent=b"y" * 32)):
            other = chain._replace(names=[*chain.names[:-1], name])
            assert len(self._call(number, lookup, other)) < len(path)
        assert self._call(number, lookup, chain._replace(scope=b"o" * 16)) == []

    @rule(number=STORES, path=PATHS, counts=st.lists(st.integers(0, 15), min_size=6, max_size=6))
    def touch(self, number: int, path: tuple[int, ...], counts: list[int]) -> None:
        before, chain = self._served(), self._chain(path)
        keys = [chain.key(at) for at in range(len(path))]
        self._call(number, touch, keys, counts[: len(keys)])
        assert self._served() == before

    @rule(number=STORES, path=PATHS)
    def remove(self, number: int, path: tuple[int, ...]) -> None:
        before, key = self._served(), self._chain(path).key(len(path) - 1)
        self._call(number, remove, key)
        after = self._served()
        assert after == {each: number for each, number in before.items() if each != key}
        self.orphans |= self._call(0, parentless)

    @rule(number=STORES, label=st.sampled_from(["all", "model:m", *TENANTS]))
    def purge(self, number: int, label: str) -> None:
        before = self._served()
        epoch = self._call(number, purge, label)
        assert self._call(1 - number, purge_epoch) == epoch
        after = self._served()
        if label not in TENANTS:
            assert after == {}
            return
        tenant = TENANTS.index(label)
        ours, theirs = self._chain((tenant,)).key(0), self._chain((1 - tenant,)).key(0)
        assert ours not in after
        assert (theirs in after) is (theirs in before)

    @rule(seconds=st.sampled_from([1.0, 40.0, TTL_S + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        assert seconds < TTL_S or self._served() == {}

    @rule(number=STORES, most=st.integers(1, 8))
    def sweep(self, number: int, most: int) -> None:
        before = self._served()
        assert self._call(number, sweep, most) == len(before)
        assert self._served() == before
        self.orphans |= self._call(0, parentless)

    @rule(number=STORES, dies=st.booleans())
    def reopen(self, number: int, dies: bool) -> None:
        before = self._served()
        self._call(number, die if dies else PrefixStore.close)
        self._open(number)
        self.pending = [each for each in self.pending if each[0] != number]
        assert self._served() == before

    @rule(data_pages=st.sampled_from(DATA_PAGES))
    def change_the_limit(self, data_pages: int) -> None:
        before = self._served()
        is_smaller = data_pages < self.limits.data_pages
        self.limits = FileLimits(1024**2, data_pages)
        for number in (0, 1):
            self._call(number, PrefixStore.close)
        for number in (0, 1):
            self._open(number)
        self.pending = []
        after = self._served()
        assert before.items() >= after.items() if is_smaller else before == after
        self.orphans |= self._call(0, parentless)

    @rule(number=STORES)
    def make_smaller(self, number: int) -> None:
        before = self._served()
        assert self._call(number, compact) >= 0
        assert self._served() == before
        assert self._call(1 - number, verify).damaged == 0
        # What is left free is less than the last block needs.
        assert self.pending or self._call(number, free_bytes) < LARGEST

    @invariant()
    def holds(self) -> None:
        if self.is_open:
            self._call(0, check_store, self.limits, self.orphans)


StoreMachine.TestCase.settings = settings(max_examples=1000 if LONG else 60, stateful_step_count=40)
TestStore = StoreMachine.TestCase
