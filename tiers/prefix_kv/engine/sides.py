"""The two sides of a connector, one in the scheduler's process and one in each worker's.

They put the parts together, and know nothing of an engine's classes.
"""

import json
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from tiers.key import scope_of
from tiers.prefix_kv.data_file import PAGE_BYTES
from tiers.prefix_kv.engine.bookkeeping import Bookkeeper
from tiers.prefix_kv.engine.orders import StepOrders
from tiers.prefix_kv.engine.planner import Planner
from tiers.prefix_kv.engine.rates import LoadGate
from tiers.prefix_kv.engine.transfers import BlockCopies, BlockLoader, BlockSaver, saver_slots
from tiers.prefix_kv.options import ConnectorOptions
from tiers.prefix_kv.record import BlockChain, BlockName
from tiers.prefix_kv.scope import adapted
from tiers.prefix_kv.store import PrefixStore, StoreConfig
from tiers.purges.table import label

_MAX_STEPS = 4
"""That an engine has ordered at a time; it orders one or two."""

_stores: dict[StoreConfig, PrefixStore] = {}
_stores_lock = threading.Lock()


def open_shared(config: StoreConfig) -> PrefixStore:
    """Return this process's store; LMDB takes no second one of a file.

    Where scheduler and worker are one process, they share it. It is open until the process ends.

    Raises:
        as `PrefixStore`.
    """
    with _stores_lock:
        if config not in _stores:
            _stores[config] = PrefixStore(config)
        return _stores[config]


class Prompt(NamedTuple):
    """A request's prompt, as the engine knows it."""

    hashes: Sequence[bytes]
    """Of its full blocks."""
    tokens: Sequence[int]
    """Empty if it has none, but embeddings."""
    number: int
    """Of its tokens."""
    adapter: str
    salt: str
    is_plain: bool
    """Whether tokens, adapter and salt are all that the hashes are made of."""
    is_warm: bool
    """Whether the request only fills the engine's cache."""


class SchedulerSide:
    """The scheduler's side.

    Args:
        options: of the connector.
        store: the store.
        scopes: of the workers, in their order.
        block_tokens: tokens of a block.
        block_bytes: bytes of a block at one worker.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        options: ConnectorOptions,
        store: PrefixStore,
        scopes: Sequence[bytes],
        *,
        block_tokens: int,
        block_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._store, self._block_tokens = options, store, block_tokens
        self._scopes = {"": list(scopes)}
        for adapter, fingerprint in options.adapters.items():
            self._scopes[adapter] = [adapted(scope, fingerprint) for scope in scopes]
        room = store.limit_pages * PAGE_BYTES // (block_bytes * len(scopes))
        self.books = Bookkeeper(store.index, options.model, scopes[0], room)
        self._gate = LoadGate(options.min_tokens, clock)
        self.planner = Planner(
            store.index, self.books, self._scopes.__getitem__, block_tokens=block_tokens,
            store_after=options.store_after, gate=self._gate, clock=clock,
        )  # fmt: skip
        self.planner.room = saver_slots(block_bytes)
        self._saves_over = dict.fromkeys(range(len(scopes)), 0)
        """By rank, how many orders to store a block are over at a worker."""
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=_MAX_STEPS)
        """When steps began that aren't over, and their tokens."""
        self._step_ended_at = 0.0
        self._failed: set[str] = set()
        """Requests whose load has failed at a worker, and isn't over at another."""

    def add(self, request: str, prompt: Prompt) -> None:
        """Take in a new request; one with an adapter that we don't know is left alone."""
        is_known = prompt.adapter in self._scopes and len(prompt.tokens) == prompt.number
        if is_known and not self.books.is_lost:
            self.planner.add(request, self._chain(prompt), prompt.number, is_warm=prompt.is_warm)

    def begin_step(self, tokens: int) -> StepOrders:
        """Take note of a step that computes so many tokens; returns what was ordered for it."""
        if tokens:
            self._steps.append((self._clock(), tokens))
        return self.planner.take_orders()

    def finish(self, loaded: Iterable[str], failed: set[str]) -> None:
        """Take note of the end of a step, and of loads."""
        if self._steps:
            began_at, tokens = self._steps.popleft()
            now = self._clock()
            # An engine may order a step before the last one is over.
            self._gate.note_computed(tokens, now - max(began_at, self._step_ended_at))
            self._step_ended_at = now
        # A load is over when it is at all workers, and may have failed at one long before.
        self._failed |= failed
        for request in loaded:
            self.planner.finish_load(request, request in self._failed)
            self._failed.discard(request)

    def note_saves(self, over: Mapping[int, int]) -> None:
        """Take note of how many orders to store a block are over at workers, by rank."""
        before = min(self._saves_over.values())
        self._saves_over |= over
        self.planner.room += min(self._saves_over.values()) - before

    def purge(self) -> None:
        """Purge the model's blocks, soon."""
        labels = (label("model", self._options.model),)
        threading.Thread(target=self._store.index.purge, args=(labels,), daemon=True).start()

    def close(self) -> None:
        """Write what is left."""
        self.books.close()

    def _chain(self, prompt: Prompt) -> BlockChain:
        packed = memoryview(array("I", prompt.tokens)).cast("B")
        block_bytes = self._block_tokens * 4
        parents = [b"", *prompt.hashes]
        names = [
            BlockName(own, parent, bytes(packed[at * block_bytes : (at + 1) * block_bytes]))
            for at, (own, parent) in enumerate(zip(prompt.hashes, parents, strict=False))
        ]
        labels = {label("model", self._options.model)}
        if prompt.adapter:
            labels.add(label("model", prompt.adapter))
        if tenant := scope_of(prompt.salt):
            labels.add(label("tenant", tenant))
        return BlockChain(
            self._scopes[""][0], names, tuple(sorted(labels)), prompt.adapter, prompt.salt,
            prompt.is_plain,
        )  # fmt: skip


class WorkerSide:
    """A worker's side.

    Args:
        options: of the connector.
        store: the store.
        scope: of this worker's blocks.
        copies: copies blocks from and to its cache.
        rank: of this worker.
    """

    def __init__(
        self,
        options: ConnectorOptions,
        store: PrefixStore,
        scope: bytes,
        copies: BlockCopies,
        rank: int,
    ) -> None:
        self._scope, self._adapters = scope, options.adapters
        self.copies = copies
        with ExitStack() as begun:
            self.books = Bookkeeper(store.index, options.model)
            begun.callback(self.books.close)
            self.loader = BlockLoader(store, copies, rank, self.books.counts)
            begun.callback(self.loader.close)
            self.saver = BlockSaver(store, copies, self._scope_of, self.books.counts)
            # All has begun, so nothing is to be ended.
            begun.pop_all()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._rank, self._saves_told = rank, 0

    def take_finished(self) -> set[str]:
        """Return the requests whose loads are over."""
        results = self.loader.finished()
        for result in results:
            if result.failed_block_ids:
                self._failed_blocks.update(result.failed_block_ids)
                self._failed_requests.add(result.request)
        return {result.request for result in results}

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks that loads that are over have not brought."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Return the requests whose loads have failed."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_saves_over(self) -> dict[int, int]:
        """Return our rank, and how many orders to store a block are over, if there are more now."""
        before, self._saves_told = self._saves_told, self.saver.over
        return {self._rank: self._saves_told} if self._saves_told != before else {}

    def close(self) -> None:
        """Store what is staged."""
        self.saver.close()
        self.loader.close()
        self.books.close()

    def _scope_of(self, adapter: str) -> bytes:
        return adapted(self._scope, self._adapters[adapter]) if adapter else self._scope


def describe(facts: Mapping[str, Any], model: str) -> bytes:
    """Return a description of a scope."""
    described = {"model": model, "opened_at": time.time(), **facts}
    return json.dumps(described, default=str).encode()
