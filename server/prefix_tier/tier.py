"""The prefix tier's store in this process: opened, kept in step with purges, and reported.

One thread does all that may wait, so that a slow disk holds up nobody. Invariants: this process has
at most one store open; no failure of it fails a request; purges that can't be written are kept and
tried again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple

from server.prefix_tier.held_store import HeldStore, beside
from server.prefix_tier.labels import PrefixLabels
from tiers import Purges
from tiers.prefix_kv.chains import StoredChain, hottest_chains
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.maintenance import compact, verify
from tiers.prefix_kv.store import PrefixStore, StoreConfig
from tiers.purges.table import ALL, PurgeTable

logger = logging.getLogger(__name__)

_EVERY_S = 0.5
_PURGE_S = 5.0
# A report that is older says nothing of now: the disk hangs.
_STALE_S = 5.0
_MAX_PENDING = 1000


class PrefixTierError(OSError):
    """The store can't be used now."""


class PrefixNumbers(NamedTuple):
    """The store in numbers."""

    available: bool
    """Whether it could be read a moment ago."""
    max_bytes: int
    blocks: int = 0
    block_bytes: int = 0
    file_bytes: int = 0
    free_bytes: int = 0
    counters: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    """By model and name (`tiers.prefix_kv.counters`)."""

    def total(self, name: str) -> float:
        """Return a counter of all models together."""
        return sum(of_model.get(name, 0) for of_model in self.counters.values())

    def as_json(self) -> dict[str, Any]:
        """Return it as the admin API gives it."""
        return self._asdict() | {"counters": {n: {**each} for n, each in self.counters.items()}}


class PrefixTier:
    """The store of one folder.

    Args:
        config: where it is.
        purges: those of answers, which hold for blocks, too.
        labels: what purges of answers are called here.
        open_store: opens the store.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        config: StoreConfig,
        purges: Purges,
        labels: PrefixLabels,
        *,
        open_store: Callable[[StoreConfig], PrefixStore] = PrefixStore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._purges, self._labels = purges, labels
        self._open_store, self._clock = open_store, clock
        self._thread = ThreadPoolExecutor(1, "prefix-tier")
        self._held: HeldStore | None = None
        self._left: HeldStore | None = None
        # Of the store that is open.
        self._merged: PurgeTable | None = None
        self._pending: list[str] = []
        self._report = PrefixNumbers(available=False, max_bytes=config.max_bytes)
        self._reported_at = -inf
        self._problem = ""

    @property
    def report(self) -> PrefixNumbers:
        """The numbers of a moment ago; those of an empty store while it can't be read."""
        is_stale = self._clock() - self._reported_at > _STALE_S
        return self._unreadable() if is_stale else self._report

    async def run(self) -> None:
        """Keep the store open and in step with purges until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(_EVERY_S)

    async def refresh(self) -> None:
        """Open the store if need be, write purges that it lacks, and read its numbers."""
        await self._in_thread(self._refresh, self._purges.current())

    async def purge(self, labels: Sequence[str]) -> None:
        """Purge the blocks that these labels of answers cover; returns when engines find none.

        Raises:
            PrefixTierError: that couldn't be written in time; it is tried again.
        """
        names = [name for label in labels for name in self._labels.of(label)]
        if not names:
            return
        try:
            async with asyncio.timeout(_PURGE_S):
                await self._in_thread(self._purge, names)
            problem = self._problem
        except TimeoutError:
            problem = "the disk takes too long"
        if problem:
            raise PrefixTierError(f"the prefix tier could not store the purge in time: {problem}")

    async def chains(self, most: int, label: str = "") -> list[StoredChain]:
        """Return the hottest chains; with a label of answers, those that its purge would cover.

        Raises:
            PrefixTierError: the store can't be read.
        """
        names = self._labels.of(label) if label else (ALL,)
        if not names:
            return []
        found = await asyncio.to_thread(self._chains, most, () if ALL in names else names)
        return [each._replace(labels=self._shown(each.labels)) for each in found]

    async def verify(self, *, repair: bool = False) -> dict[str, int]:
        """Read all blocks; returns how many there are, and how many of them are damaged.

        With `repair`, those are removed.

        Raises:
            PrefixTierError: the store can't be read.
        """
        return await beside(partial(self._verify, repair=repair))

    async def compact(self) -> int:
        """Make the files smaller; returns how many bytes that saved.

        Raises:
            PrefixTierError: the store can't be used.
        """
        return await beside(self._compact)

    @contextmanager
    def using(self) -> Iterator[PrefixStore]:
        """Keep the store open meanwhile; for threads.

        Raises:
            PrefixTierError: it isn't open, or fails.
        """
        held = self._held
        if held is None or not held.enter():
            raise PrefixTierError(
                f"the prefix tier can't be read: {self._problem or 'not open yet'}"
            )
        try:
            yield held.store
        except Exception as exc:
            # A damaged file may raise anything.
            raise PrefixTierError(f"the prefix tier can't be read: {exc}") from exc
        finally:
            held.leave()

    @contextmanager
    def reading(self) -> Iterator[PrefixIndex]:
        """Keep the index open meanwhile, as `using`."""
        with self.using() as store:
            yield store.index

    async def close(self, *, ended_engines: bool = False) -> None:
        """Close the store, unless the thread or another hangs in it; `run` must have ended.

        With `ended_engines`, processes that had it open and are gone were ended by us.
        """
        self._thread.submit(self._end, ended_engines)
        await asyncio.to_thread(self._thread.shutdown)

    def _shown(self, labels: Sequence[str]) -> tuple[str, ...]:
        return tuple(shown for each in labels for shown in self._labels.shown(each))

    async def _in_thread(self, call: Callable[..., None], *arguments: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    # What follows runs in threads.

    def _refresh(self, table: PurgeTable) -> None:
        was_open = self._held is not None
        try:
            self._keep_up(table)
        except Exception as exc:  # noqa: BLE001
            # A damaged file may raise anything. Who opens it again finds out, and begins anew.
            self._report = self._unreadable()
            self._drop()
            if was_open:
                self._refresh(table)
            else:
                self._note(exc)

    def _keep_up(self, table: PurgeTable) -> None:
        store = self._opened()
        if self._pending:
            store.index.purge(self._pending)
            self._pending = []
        if table is not self._merged:
            store.index.merge_purges(table.renamed(self._labels.of))
            self._merged = table
        self._report = self._read(store)
        self._reported_at = self._clock()
        self._solve()

    def _unreadable(self) -> PrefixNumbers:
        # Counters stay, since a fall would look like a new start.
        return PrefixNumbers(
            available=False, max_bytes=self.config.max_bytes, counters=self._report.counters
        )

    def _purge(self, names: Sequence[str]) -> None:
        # Everything, if they would become too many.
        self._pending = [*dict.fromkeys([*self._pending, *names])]
        if len(self._pending) > _MAX_PENDING:
            self._pending = [ALL]
        self._refresh(PurgeTable() if self._merged is None else self._merged)

    def _opened(self) -> PrefixStore:
        if self._held is not None and self._held.is_replaced():
            self._drop()
        if self._held is None:
            # LMDB forbids to open a file twice.
            if self._left is not None and self._left.is_open:
                raise OSError("somebody still reads the store that was open before")
            self._held, self._merged = HeldStore(self._open_store(self.config)), None
        return self._held.store

    def _end(self, ended_engines: bool) -> None:
        if ended_engines and self._held is not None:
            with suppress(OSError):
                self._held.store.folder.forgive_deaths()
        self._drop()

    def _drop(self) -> None:
        if self._held is not None:
            self._left, self._held = self._held, None
            self._left.leave()

    def _read(self, store: PrefixStore) -> PrefixNumbers:
        numbers = store.statistics()
        counters: dict[str, dict[str, float]] = {}
        for (model, name), value in store.index.counters().items():
            counters.setdefault(model, {})[name] = value
        return PrefixNumbers(
            available=True,
            max_bytes=self.config.max_bytes,
            blocks=numbers.blocks,
            block_bytes=numbers.block_bytes,
            file_bytes=numbers.file_bytes,
            free_bytes=numbers.free_bytes,
            counters=counters,
        )

    def _chains(self, most: int, names: Sequence[str]) -> list[StoredChain]:
        with self.using() as store:
            return hottest_chains(store.index, most, names)

    def _verify(self, *, repair: bool) -> dict[str, int]:
        with self.using() as store:
            return verify(store, repair=repair)._asdict()

    def _compact(self) -> int:
        with self.using() as store:
            return compact(store)

    def _note(self, exc: Exception) -> None:
        problem = str(exc) or type(exc).__name__
        if problem != self._problem:
            self._problem = problem
            logger.error("the prefix tier in %s can't be used: %s", self.config.folder, problem)

    def _solve(self) -> None:
        if self._problem:
            self._problem = ""
            logger.info("the prefix tier in %s is used again", self.config.folder)
