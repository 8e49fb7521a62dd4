"""What a store keeps, for whom, in what order it evicts, and what an encrypted one shows."""

from pathlib import Path

import pytest

from tests.tiers.conftest import Clock
from tests.tiers.prefix_kv.blocks import (
    LARGEST,
    ROOMY,
    SCOPE,
    chain_of,
    check_store,
    content_of,
    found,
    opened,
    read,
    store_chain,
)
from tiers.encryption import TAG_BYTES, EncryptionKeyError
from tiers.frequency import FrequencySketch
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES, DamagedBlockError
from tiers.prefix_kv.index.index_file import INDEX, FileLimits
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import SCOPE_BYTES, BlockDetails
from tiers.prefix_kv.store import MIN_BYTES, Location, PrefixStore, StoreConfig, Stored
from tiers.purges.table import PurgeTable

KEY = bytes(range(32))
PAGE = PAGE_BYTES - TAG_BYTES
"""A block that takes one page, encrypted or not."""


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def store(request, tmp_path, clock: Clock):
    made = opened(tmp_path, key=request.param, clock=clock)
    yield made
    check_store(made, ROOMY)
    made.close()


def test_a_chain_is_found_as_far_as_it_is_stored(store) -> None:
    assert store_chain(store, chain_of(1, 2, 3)) == Stored(3, 0)
    assert store_chain(store, chain_of(1, 2, 3)) == Stored(0, 0)
    assert found(store, chain_of(1, 2, 3, 4)) == 3
    assert found(store, chain_of(1, 2, 5)) == 2
    assert found(store, chain_of(2, 2, 3)) == 0
    assert store.index.lookup(chain_of()) == []


def test_what_is_stored_outlives_the_store(tmp_path, clock) -> None:
    for _ in range(3):
        store = opened(tmp_path, key=KEY, clock=clock)
        store_chain(store, chain_of(1, 2))
        assert found(store, chain_of(1, 2)) == 2
        store.close()


def test_a_scope_sees_its_own_blocks_only(store) -> None:
    scopes = [bytes([number]) * SCOPE_BYTES for number in range(3)]
    for scope in scopes[:2]:
        store_chain(store, chain_of(1, 2, scope=scope))
    assert [found(store, chain_of(1, 2, scope=scope)) for scope in scopes] == [2, 2, 0]
    keys = [chain_of(1, 2, scope=scope).key(at) for scope in scopes for at in range(2)]
    assert store.index.holds(keys) == set(keys[:4])
    assert {key[:SCOPE_BYTES] for key, _ in store.index.hottest(scopes[1:])} == {scopes[1]}


def test_the_parent_of_a_block_must_be_stored(store) -> None:
    chain = chain_of(1, 2, 3)
    block = NewBlock(chain, 2, LARGEST, 2, 0)
    scratch = memoryview(bytearray(LARGEST + TAG_BYTES))
    content = memoryview(content_of(chain, 2))
    assert store.write([(block, content)], scratch) == Stored(0, 0)
    assert store.statistics().blocks == 0


@pytest.mark.parametrize("size", [1, PAGE, PAGE_BYTES, PAGE_BYTES + 1, LARGEST])
def test_blocks_of_any_size_are_read_as_they_were(store, size: int) -> None:
    store_chain(store, chain_of(1), size=size)
    (block,) = store.index.lookup(chain_of(1))
    assert block.size == size
    assert read(store, block) == content_of(chain_of(1), 0, size)


def test_a_block_is_found_until_it_expires_and_its_children_with_it(tmp_path, clock) -> None:
    config = StoreConfig(tmp_path, MIN_BYTES, ttl_s=100)
    store = PrefixStore(config, clock)
    store_chain(store, chain_of(1))
    clock.now += 60
    store_chain(store, chain_of(1, 2))
    assert found(store, chain_of(1, 2)) == 2
    clock.now += 41
    assert found(store, chain_of(1, 2)) == 0
    assert store.statistics().blocks == 2
    assert store.index.sweep(b"", 100) == b""
    assert store.statistics().blocks == 0
    assert store_chain(store, chain_of(1, 2)).stored == 2
    store.close()


def test_a_purge_hides_what_was_requested_before_it(store) -> None:
    ours, theirs = chain_of(1, labels=["tenant:a"]), chain_of(2, labels=["tenant:b"])
    for chain in (ours, theirs):
        store_chain(store, chain)
    assert store.index.purge_epoch() == 0
    store.index.merge_purges(PurgeTable().with_purge(7, "tenant:a"))
    assert store.index.purge_epoch() == 7
    assert (found(store, ours), found(store, theirs)) == (0, 1)
    # What an engine had begun to compute before the purge isn't stored.
    assert store_chain(store, ours, epoch=6).stored == 0
    assert store_chain(store, ours, epoch=7).stored == 1
    assert found(store, ours) == 1


def test_a_purge_between_reservation_and_publication_counts(store) -> None:
    chain = chain_of(1, labels=["tenant:a"])
    reserved, _ = store.index.reserve([NewBlock(chain, 0, PAGE, 2, 0)])
    store.index.merge_purges(PurgeTable().with_purge(7, "tenant:a"))
    assert store.index.publish([(reserved[0], bytes(TAG_BYTES))]) == 0
    assert store.statistics()[:2] == (0, 0)


def test_the_least_requested_is_evicted_leaves_first(tmp_path) -> None:
    limits = FileLimits(1024**2, 6)
    store = opened(tmp_path, limits)
    store_chain(store, chain_of(1, 2, 3), requests=5, size=PAGE)
    store_chain(store, chain_of(4, 5, 6), requests=2, size=PAGE)
    assert store_chain(store, chain_of(7, 8), requests=3, size=PAGE) == Stored(2, 2)
    kept = [found(store, chain_of(*path)) for path in ((1, 2, 3), (4, 5, 6), (7, 8))]
    assert kept == [3, 1, 2]
    check_store(store, limits)
    store.close()


def test_what_is_worth_less_than_all_others_is_not_stored(tmp_path) -> None:
    limits = FileLimits(1024**2, 2)
    store = opened(tmp_path, limits)
    store_chain(store, chain_of(1, 2), requests=5, size=PAGE)
    assert store_chain(store, chain_of(3), requests=4, size=PAGE) == Stored(0, 0)
    # Nor does a chain evict its own beginning, or a block what can't make room for it.
    assert store_chain(store, chain_of(1, 2, 3), requests=9, size=PAGE) == Stored(0, 0)
    assert store_chain(store, chain_of(3), requests=9, size=LARGEST) == Stored(0, 0)
    assert found(store, chain_of(1, 2)) == 2
    store.close()


def test_requests_raise_a_block_and_age_outruns_old_favourites(tmp_path) -> None:
    store = opened(tmp_path, FileLimits(1024**2, 2))
    store_chain(store, chain_of("old"), requests=5, size=PAGE)
    store_chain(store, chain_of("new"), requests=2, size=PAGE)
    store.index.touch([([chain_of("new").key(0)], [6])])
    store_chain(store, chain_of("third"), requests=5, size=PAGE)
    assert found(store, chain_of("old")) == 0
    # The age is 5 now, so what is requested twice is worth as much as a favourite of then.
    store_chain(store, chain_of("fourth"), requests=2, size=PAGE)
    assert (found(store, chain_of("new")), found(store, chain_of("third"))) == (0, 1)
    store.close()


def test_the_hottest_come_first_and_lead_to_their_chains(store) -> None:
    store_chain(store, chain_of(1, 2, 3), requests=2)
    store_chain(store, chain_of(4, 5), requests=9)
    chains = [chain_of(4, 5), chain_of(1, 2, 3)]
    expected = [(chain.key(at), at) for chain in chains for at in range(len(chain.names))]
    assert list(store.index.hottest([SCOPE])) == expected
    linked = store.index.chain_to(chain_of(1, 2, 3).key(2))
    details = [each for _, each in linked]
    names = chain_of(1, 2, 3).names
    assert details == [BlockDetails(name.parent, "", "", name.tokens) for name in names]
    assert store.index.chain_to(chain_of(1, 9).key(1)) is None
    block = store.index.get(chain_of(1).key(0))
    store.discard(Location.of(block))
    assert store.index.chain_to(chain_of(1, 2, 3).key(2)) is None
    # The rest is found again once the first block is back.
    assert store_chain(store, chain_of(1, 2, 3), requests=2).stored == 1
    assert found(store, chain_of(1, 2, 3)) == 3


def test_salt_and_adapter_are_kept(store) -> None:
    chain = chain_of(1, 2)._replace(adapter="finch", salt="s" * 70_000 + "\ud800")
    store_chain(store, chain)
    (_, first), (_, second) = store.index.chain_to(chain.key(1))
    assert (first.adapter, first.salt) == ("finch", chain.salt)
    assert (second.adapter, second.salt) == ("finch", "")


def test_all_blocks_are_listed_in_batches(tmp_path) -> None:
    store = opened(tmp_path)
    blocks = [(NewBlock(chain_of(number), 0, 1, 2, 0), memoryview(b"x")) for number in range(300)]
    store.write(blocks, memoryview(bytearray(1)))
    listed = [block.key for block in store.index.blocks()]
    assert sorted({chain_of(number).key(0) for number in range(300)}) == listed
    assert len(list(store.index.hottest([SCOPE]))) == 300
    store.close()


def test_counters_sketches_and_scopes_are_kept(store) -> None:
    store.index.save({("m", "hits"): 2.0, ("n", "hits"): 1.0}, {})
    store.index.save({("m", "hits"): 0.5}, {SCOPE: lambda saved: saved or b"new"})
    store.index.save({}, {SCOPE: lambda saved: saved + b"er"})
    assert store.index.counters() == {("m", "hits"): 2.5, ("n", "hits"): 1.0}
    assert store.index.sketch(SCOPE) == b"newer"
    assert store.index.sketch(b"o" * SCOPE_BYTES) is None
    store.index.describe_scope(SCOPE, b"{}")
    assert store.index.scopes() == {SCOPE: b"{}"}


def test_scopes_without_blocks_are_forgotten_when_there_are_many(store) -> None:
    scopes = [bytes([number]) * SCOPE_BYTES for number in range(50)]
    store_chain(store, chain_of(1, scope=scopes[3]))
    for scope in scopes:
        store.index.describe_scope(scope, scope)
        store.index.save({}, {scope: lambda _: b"sketch"})
    kept = store.index.scopes()
    assert scopes[3] in kept
    assert scopes[-1] in kept
    assert len(kept) <= 33
    assert store.index.sketch(scopes[0]) is None
    assert store.index.sketch(scopes[3]) == b"sketch"


def test_the_index_makes_room_for_many_tiny_blocks(memory) -> None:
    limits = FileLimits(1024**2, 10_000)
    store = opened(memory, limits)
    sketch = FrequencySketch(1000)
    stored = 0
    for number in range(120):
        stored += store_chain(store, chain_of(number, *range(15)), size=1).stored
        keys = [chain_of(number, *range(15)).key(at) for at in range(16)]
        store.index.touch([(keys, [3] * 16)] * 3)
        store.index.save({}, {SCOPE: lambda _: sketch.dump()})
    assert stored == 120 * 16
    assert 500 < store.statistics().blocks < stored
    assert found(store, chain_of(119, *range(15))) == 16
    check_store(store, limits)
    store.close()


def test_the_files_keep_to_the_limit_of_the_product(tmp_path) -> None:
    limits = FileLimits.of(MIN_BYTES)
    assert limits.index_bytes == 8 * 1024**2
    assert limits.index_bytes + limits.data_pages * PAGE_BYTES < MIN_BYTES
    assert FileLimits.of(2**40).index_bytes == 2**34
    assert FileLimits.of(1000).data_pages == 0


def test_idle_work_commits_nothing(store) -> None:
    store_chain(store, chain_of(1, 2))
    last = store.index._file._env.info()["last_txnid"]
    store.index.sweep(b"", 10)
    store_chain(store, chain_of(1, 2))
    store.index.merge_purges(PurgeTable())
    assert store.index._file._env.info()["last_txnid"] == last


# Encryption.


def everything_in(folder: Path) -> bytes:
    return (folder / INDEX).read_bytes() + (folder / DATA).read_bytes()


def test_an_encrypted_store_shows_no_tokens_and_no_bytes(tmp_path) -> None:
    chain = chain_of(1, 2)._replace(salt="sesame-salt", adapter="finch-adapter")
    for key, is_readable in ((None, True), (KEY, False)):
        folder = tmp_path / str(is_readable)
        store = opened(folder, key=key)
        store_chain(store, chain)
        store.close()
        held = everything_in(folder)
        secrets = [name.tokens for name in chain.names]
        secrets += [content_of(chain, at)[:32] for at in range(2)]
        secrets += [b"sesame-salt", b"finch-adapter"]
        assert [secret in held for secret in secrets] == [is_readable] * 6


def test_another_key_or_none_opens_nothing_and_changes_nothing(tmp_path) -> None:
    store = opened(tmp_path, key=KEY)
    store_chain(store, chain_of(1))
    store.close()
    before = everything_in(tmp_path)
    for key in (None, bytes(32)):
        with pytest.raises(EncryptionKeyError):
            opened(tmp_path, key=key)
    assert everything_in(tmp_path) == before
    plain = tmp_path / "plain"
    opened(plain).close()
    with pytest.raises(EncryptionKeyError):
        opened(plain, key=KEY)
    store = opened(tmp_path, key=KEY)
    assert found(store, chain_of(1)) == 1
    store.close()


def test_no_number_is_used_twice_even_after_a_copy(tmp_path) -> None:
    """Two blocks encrypted under one number would give both away."""
    one, other = tmp_path / "one", tmp_path / "other"
    store = opened(one, key=KEY)
    store_chain(store, chain_of(0))
    store.close()
    other.mkdir()
    for name in (INDEX, DATA):
        (other / name).write_bytes((one / name).read_bytes())
    numbers = []
    for folder in (one, other, one):
        store = opened(folder, key=KEY)
        for number in range(5):
            store_chain(store, chain_of(len(numbers), number))
        numbers += [block.sequence for block in store.index.blocks()]
        for block in list(store.index.blocks()):
            store.discard(Location.of(block))
        store.close()
    # The first block was in the folder and in its copy.
    assert len(set(numbers)) == len(numbers) - 1


def test_a_block_does_not_pass_for_another(store) -> None:
    store_chain(store, chain_of(1, 2))
    one, two = store.index.lookup(chain_of(1, 2))
    swapped = Location.of(one)._replace(extents=two.extents)
    renumbered = Location.of(one)._replace(sequence=two.sequence)
    into, scratch = memoryview(bytearray(LARGEST)), memoryview(bytearray(LARGEST + TAG_BYTES))
    for location in (swapped, renumbered):
        with pytest.raises(DamagedBlockError):
            store.read(location, into, scratch)
