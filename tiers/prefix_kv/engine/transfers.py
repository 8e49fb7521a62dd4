"""What an engine's worker does: copies blocks from disk to the engine's cache, and back.

Owns two threads: one reads and one writes, so the model waits for copies in memory only. A block is
verified before it is copied into the engine's cache. Invariant: a load is reported as finished
exactly once, and nothing is copied into its blocks after that, since the engine computes what a
load has not brought, and gives blocks to other requests.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import lmdb

from tiers.encryption import TAG_BYTES
from tiers.prefix_kv.counters import EngineCounts
from tiers.prefix_kv.data_file import DamagedBlockError
from tiers.prefix_kv.engine.orders import LoadOrder, SaveOrder
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.store import Location, PrefixStore

logger = logging.getLogger(__name__)

STAGING_BYTES = 128 * 1024**2
"""For blocks that wait to be written; at least for `_MIN_SLOTS` of them."""
_MIN_SLOTS = 4
_WRITTEN_AT_ONCE = 16
_PAUSE_S = 30.0
"""After a write that failed, blocks are dropped for so long."""
_CLOSE_S = 5.0


class BlockCopies(Protocol):
    """Copies blocks between the engine's cache and memory of ours."""

    block_bytes: int

    def staging(self, blocks: int) -> list[memoryview]:
        """Return memory for so many blocks, from and to which copies are fast."""

    def begin_loads(self) -> None:
        """Have loads that are ordered now wait for what is computed in their blocks, or saved."""

    def save(self, block_id: int, into: memoryview) -> Callable[[], None]:
        """Begin to copy a block of the engine's cache; returns what waits for the end of it.

        The copy is of what the engine has ordered to be computed until now.
        """

    def load(self, content: memoryview, block_id: int) -> None:
        """Copy into a block of the engine's cache, and wait for the end of it."""

    def protect(self, block_ids: Sequence[int]) -> None:
        """Have the engine wait before it overwrites blocks that are still being saved."""


class FinishedLoad(NamedTuple):
    """The end of a load."""

    request: str
    failed_block_ids: list[int]


@dataclass(slots=True)
class _Load:
    order: LoadOrder
    locations: list[Location]
    give_up_at: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: int = 0
    """Blocks that are in the engine's cache."""
    is_over: bool = False


class BlockLoader:
    """Loads blocks, in the order of the requests.

    Args:
        store: where they are.
        copies: where they go.
        rank: of this worker.
        counts: counts damage and errors.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        store: PrefixStore,
        copies: BlockCopies,
        rank: int,
        counts: EngineCounts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._copies, self._rank, self._counts = store, copies, rank, counts
        self._clock = clock
        self._loads: list[_Load] = []
        self._queue: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        (self._staging,) = copies.staging(1)
        self._scratch = memoryview(bytearray(copies.block_bytes + TAG_BYTES))
        self._thread = threading.Thread(target=self._run, name="prefix loads", daemon=True)
        self._thread.start()

    def start(self, order: LoadOrder) -> None:
        """Begin a load. The scheduler bounds their number."""
        locations = [by_worker[self._rank] for by_worker in order.locations]
        load = _Load(order, locations, self._clock() + order.deadline_s)
        self._copies.begin_loads()
        self._loads.append(load)
        self._queue.put(load)

    def finished(self) -> list[FinishedLoad]:
        """Return the loads that are over since the last call, and give up those that are late."""
        results: list[FinishedLoad] = []
        pending: list[_Load] = []
        for load in self._loads:
            if not load.is_over and self._clock() > load.give_up_at:
                with load.lock:
                    load.is_over = True
            if load.is_over:
                results.append(FinishedLoad(load.order.request, load.order.block_ids[load.done :]))
            else:
                pending.append(load)
        self._loads = pending
        return results

    def close(self) -> None:
        """Stop, but don't wait long for a disk that hangs."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (load := self._queue.get()) is not None:
            try:
                self._load(load)
            except Exception:
                # Whatever it is, the request must be computed.
                self._counts.add("errors")
                logger.exception("prefix blocks could not be loaded")
            load.is_over = True

    def _load(self, load: _Load) -> None:
        for location, block_id in zip(load.locations, load.order.block_ids, strict=True):
            if load.is_over or not self._read(location):
                return
            with load.lock:
                if load.is_over:
                    return
                self._copies.load(self._staging, block_id)
                load.done += 1

    def _read(self, location: Location) -> bool:
        if location.size != self._copies.block_bytes:
            return False
        try:
            self._store.read(location, self._staging, self._scratch)
        except DamagedBlockError as exc:
            # Another block may just have taken its place.
            if self._store.discard(location):
                self._counts.add("damaged_blocks")
                logger.error("a prefix block was damaged on disk, and is computed anew: %s", exc)
            return False
        except OSError as exc:
            self._counts.add("errors")
            logger.error("prefix blocks can't be read: %s", exc)
            return False
        return True


class _Staged(NamedTuple):
    order: SaveOrder
    content: memoryview
    wait: Callable[[], None]


def saver_slots(block_bytes: int) -> int:
    """Return for how many blocks of this size a `BlockSaver` has memory."""
    return max(STAGING_BYTES // block_bytes, _MIN_SLOTS)


class BlockSaver:
    """Stores blocks, in batches beside the model. What doesn't fit into its memory is dropped.

    Args:
        store: where they go.
        copies: where they are.
        scope: returns the scope of this worker's blocks for an adapter, or for none.
        counts: counts what was stored, dropped and evicted.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        store: PrefixStore,
        copies: BlockCopies,
        scope: Callable[[str], bytes],
        counts: EngineCounts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._copies, self._scope, self._counts = store, copies, scope, counts
        self._clock, self._paused_until = clock, 0.0
        self._over, self._over_lock = 0, threading.Lock()
        self._slots: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for slot in copies.staging(saver_slots(copies.block_bytes)):
            self._slots.put(slot)
        self._scratch = memoryview(bytearray(copies.block_bytes + TAG_BYTES))
        self._queue: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefix saves", daemon=True)
        self._thread.start()

    def stage(self, orders: Sequence[SaveOrder]) -> None:
        """Copy blocks that are to be stored, while the model waits."""
        began_at, staged = self._clock(), 0
        try:
            if began_at >= self._paused_until:
                while staged < len(orders) and self._stage(orders[staged]):
                    staged += 1
        finally:
            if dropped := len(orders) - staged:
                self._counts.add("dropped_blocks", dropped)
                self._end(dropped)
            self._counts.add("store_seconds", self._clock() - began_at)

    def _stage(self, order: SaveOrder) -> bool:
        """Copy a block; returns whether there was memory for it."""
        try:
            slot = self._slots.get_nowait()
        except queue.Empty:
            return False
        try:
            wait = self._copies.save(order.block_id, slot)
        except BaseException:
            self._slots.put(slot)
            raise
        self._queue.put(_Staged(order, slot, wait))
        return True

    @property
    def over(self) -> int:
        """How many of all orders are over, whether their blocks were stored or dropped."""
        return self._over

    def _end(self, orders: int) -> None:
        with self._over_lock:
            self._over += orders

    def close(self) -> None:
        """Store what is staged, but don't wait long for a disk that hangs."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            staged, is_closing = self._next_batch()
            if not staged:
                continue
            try:
                self._write(staged)
            except (lmdb.Error, OSError) as exc:
                self._drop(staged)
                logger.error("prefix blocks can't be stored; tried again later: %s", exc)
            except Exception:
                self._drop(staged)
                logger.exception("prefix blocks can't be stored; tried again later")
            for each in staged:
                self._slots.put(each.content)
            self._end(len(staged))

    def _next_batch(self) -> tuple[list[_Staged], bool]:
        """Wait for blocks; returns them, and whether no more will come."""
        staged: list[_Staged] = []
        each = self._queue.get()
        while each is not None:
            staged.append(each)
            if len(staged) == _WRITTEN_AT_ONCE or self._queue.empty():
                return staged, False
            each = self._queue.get()
        return staged, True

    def _write(self, staged: Sequence[_Staged]) -> None:
        for each in staged:
            each.wait()
        size = self._copies.block_bytes
        blocks = [
            (
                NewBlock(
                    order.chain._replace(scope=self._scope(order.chain.adapter)),
                    order.at, size, order.requests, order.purge_epoch,
                ),
                content,
            )
            for order, content, _ in staged
        ]  # fmt: skip
        result = self._store.write(blocks, self._scratch)
        self._counts.add("stored_blocks", result.stored)
        self._counts.add("evicted_blocks", result.evicted)

    def _drop(self, staged: Sequence[_Staged]) -> None:
        """Give blocks up; the next ones may find room, or a disk that works."""
        self._paused_until = self._clock() + _PAUSE_S
        self._counts.add("dropped_blocks", len(staged))
        self._counts.add("errors")
