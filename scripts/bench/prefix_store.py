"""The store of prefix blocks alone: cost by the number of blocks, and MB/s in and out.

The first table is of blocks of one page, so that many fit: what a lookup of 16 blocks, a store and
a touch of as many cost, until 100,000 are stored. A store and a touch each wait for the disk; where
that is much, a second folder in memory (`--folder /dev/shm`) shows what is ours.

The second is of real blocks (128 tokens of a model of 135 million parameters, 2.95 MB): written,
read from the page cache, and read cold, after the kernel was asked to drop the file's pages; by one
process, and by two at once on one folder. All bytes that are read are verified.

Usage: prefix_store.py [--folder FOLDER] [--most BLOCKS] [--encrypt]
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256, shake_128
from multiprocessing.synchronize import Barrier
from pathlib import Path

from rows import print_row

from tiers.encryption import TAG_BYTES
from tiers.prefix_kv.data_file import DATA, PAGE_BYTES
from tiers.prefix_kv.index.index_file import FileLimits
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.prefix_kv.store import Location, PrefixStore, StoreConfig

_CHAIN = 16
"""Blocks of a prompt."""
_TOKENS = 128
_BLOCK_BYTES = 2_949_120
_CHAINS = 8
_REPEATS = 40
_SIZES = (100, 1000, 10_000, 100_000)
_SCOPE = bytes(16)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one if left")
    parser.add_argument("--most", type=int, default=_SIZES[-1], help="stored blocks")
    parser.add_argument("--encrypt", action="store_true")
    options = parser.parse_args()
    key = bytes(32) if options.encrypt else None
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print_growth(Path(folder) / "growth", key, options.most)
        print_rates(Path(folder) / "rates", key)


def chain_of(seed: object) -> BlockChain:
    """Return a chain that differs from those of other seeds."""
    names: list[BlockName] = []
    parent = b""
    for at in range(_CHAIN):
        tokens = shake_128(f"{seed} {at}".encode()).digest(4 * _TOKENS)
        names.append(BlockName(sha256(parent + tokens).digest(), parent, tokens))
        parent = names[-1].hash
    return BlockChain(_SCOPE, names, ("model:bench",))


def write(store: PrefixStore, chain: BlockChain, block: memoryview, scratch: memoryview) -> int:
    """Store a chain; returns how many blocks were stored."""
    blocks = [(NewBlock(chain, at, len(block), 2, 0), block) for at in range(_CHAIN)]
    return store.write(blocks, scratch).stored


def median_us(call: Callable[[BlockChain], object], chains: Sequence[BlockChain]) -> float:
    """Return the median time of a call with each chain."""
    times = []
    for chain in chains:
        began = time.perf_counter()
        call(chain)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


@contextmanager
def opened(folder: Path, key: bytes | None, limits: FileLimits) -> Iterator[PrefixStore]:
    """Open a store, and close it."""
    store = PrefixStore(StoreConfig(folder, 2**40, key), limits=limits)
    try:
        yield store
    finally:
        store.close()


def print_growth(folder: Path, key: bytes | None, most: int) -> None:
    """Print what calls cost by the number of stored blocks, and at last when others give way."""
    block = memoryview(bytes(PAGE_BYTES - TAG_BYTES))
    scratch = memoryview(bytearray(PAGE_BYTES))
    print(f"{'blocks':>8}{'index':>9}{'open':>9}{'lookup':>10}{'touch':>10}{'store':>10}")
    chains = 0
    roomy = FileLimits(2**30, 2 * most)
    for target in (*(size for size in _SIZES if size <= most), most):
        is_full = chains * _CHAIN >= most
        limits = roomy._replace(data_pages=most) if is_full else roomy
        with opened(folder, key, limits) as store:
            while chains * _CHAIN < target:
                write(store, chain_of(chains), block, scratch)
                chains += 1
        began = time.perf_counter()
        with opened(folder, key, limits) as store:
            opened_ms = (time.perf_counter() - began) * 1000
            held = [chain_of(chains * at // _REPEATS) for at in range(_REPEATS)]
            new = [chain_of(f"new {target} {is_full} {at}") for at in range(_REPEATS)]
            lookup = median_us(store.index.lookup, held)
            touch = median_us(lambda chain: store.index.touch([(_keys(chain), [3] * _CHAIN)]), held)
            stored = median_us(lambda chain: write(store, chain, block, scratch), new)
            index_mib = store.index.statistics().index_bytes / 2**20
        print(
            f"{f'{target:,}':>8}{index_mib:>5.0f} MiB{opened_ms:>6.1f} ms"
            f"{lookup:>7.0f} us{touch:>7.0f} us{stored:>7.0f} us{'  evicting' if is_full else ''}"
        )


def _keys(chain: BlockChain) -> list[bytes]:
    return [chain.key(at) for at in range(_CHAIN)]


def print_rates(folder: Path, key: bytes | None) -> None:
    """Print MB/s of one process and of two."""
    print(f"\n{'MB/s':<14}{'write':>9}{'read':>9}{'cold':>9}")
    for processes in (1, 2):
        rates: multiprocessing.Queue[tuple[float, float, float]] = multiprocessing.Queue()
        barrier = multiprocessing.Barrier(processes)
        at_once = [
            multiprocessing.Process(
                target=measure, args=(folder / f"{processes}", key, number, barrier, rates)
            )
            for number in range(processes)
        ]
        for process in at_once:
            process.start()
        found = [rates.get() for _ in at_once]
        for process in at_once:
            process.join()
        total = [sum(each) for each in zip(*found, strict=True)]
        name = f"{processes} process{'es' * (processes > 1)}"
        print(f"{name:<14}{total[0]:>9,.0f}{total[1]:>9,.0f}{total[2]:>9,.0f}")
        if processes == 1:
            one = ", ".join(f"{rate:,.0f} MB/s" for rate in total)
    print_row("prefix blocks, one process: written, read, read cold", one)


def measure(
    folder: Path,
    key: bytes | None,
    number: int,
    barrier: Barrier,
    rates: "multiprocessing.Queue[tuple[float, float, float]]",
) -> None:
    """Write and read chains as one of several processes does."""
    block = memoryview(os.urandom(_BLOCK_BYTES))
    scratch, into = memoryview(bytearray(_BLOCK_BYTES + TAG_BYTES)), bytearray(_BLOCK_BYTES)
    chains = [chain_of(f"{number} {at}") for at in range(_CHAINS)]
    with opened(folder, key, FileLimits.of(2**31)) as store:

        def read_all() -> None:
            for chain in chains:
                for found in store.index.lookup(chain):
                    store.read(Location.of(found), memoryview(into), scratch)

        def write_all() -> None:
            for chain in chains:
                write(store, chain, block, scratch)

        rate_of = []
        for work in (write_all, read_all, read_all):
            if len(rate_of) == 2:
                drop_pages(folder / DATA)
            barrier.wait()
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            barrier.wait()
            rate_of.append(_CHAINS * _CHAIN * _BLOCK_BYTES / 1e6 / seconds)
        rates.put((rate_of[0], rate_of[1], rate_of[2]))


def drop_pages(path: Path) -> None:
    """Ask the kernel to forget a file's pages."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


if __name__ == "__main__":
    main()
