"""Blocks of prefixes as an engine would store them, for tests without one."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.prefix_kv.store import MIN_BYTES, PrefixStore, StoreConfig

SCOPE = b"s" * 16
BLOCK_BYTES = 8192
TOKENS = 16


def opened(folder: Path, key: bytes | None = None) -> PrefixStore:
    """Open the store as an engine does."""
    return PrefixStore(StoreConfig(folder, MIN_BYTES, key))


def store_chain(
    store: PrefixStore, name: str, *labels: str, blocks: int = 3, requests: int = 2
) -> BlockChain:
    """Store a chain of blocks whose hashes are made of its name."""
    chain = chain_of(name, labels, blocks)
    epoch = store.index.purge_epoch()
    store.write(
        [
            (NewBlock(chain, at, BLOCK_BYTES, requests, epoch), memoryview(b"b" * BLOCK_BYTES))
            for at in range(blocks)
        ],
        memoryview(bytearray(BLOCK_BYTES + 64)),
    )
    assert held(store, chain) == blocks
    return chain


def chain_of(name: str, labels: Sequence[str] = (), blocks: int = 3) -> BlockChain:
    hashes = [blake2b(f"{name} {at}".encode(), digest_size=32).digest() for at in range(blocks)]
    tokens = b"t" * 4 * TOKENS
    names = [
        BlockName(own, parent, tokens) for own, parent in zip(hashes, [b"", *hashes], strict=False)
    ]
    return BlockChain(SCOPE, names, tuple(labels))


def stored(folder: Path, chains: Mapping[str, Sequence[str]]) -> dict[str, BlockChain]:
    """Store chains, each a name with labels, and close the store again."""
    store = opened(folder)
    made = {name: store_chain(store, name, *labels) for name, labels in chains.items()}
    store.close()
    return made


def held(store: PrefixStore, chain: BlockChain) -> int:
    """Return how many of the chain's blocks an engine finds."""
    return len(store.index.lookup(chain))


def held_in(folder: Path, chain: BlockChain) -> int:
    """Return how many of the chain's blocks an engine that starts now would find."""
    store = opened(folder)
    number = held(store, chain)
    store.close()
    return number
