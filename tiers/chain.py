"""The chain of tiers: lookup from the nearest, promotion of what is asked for often, storing.

Invariant: a lookup returns the entry last stored under that key, which isn't purged, and says what
it may be used for, or is a miss.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import StrEnum
from math import log
from random import random
from typing import NamedTuple

from tiers.entry import Answer, Entry, Freshness, Provenance, State
from tiers.frequency import FrequencySketch
from tiers.movement.demotion import WritePolicy
from tiers.movement.promotion import FarHit, Promotion
from tiers.movement.transfers import Transfer, Transfers
from tiers.purges.purges import Purges
from tiers.shared.purges import SharedPurges
from tiers.tier import Tier

# Promotions that wait for the disk.
_PROMOTION_BYTES = 16 * 1024**2


class Hit(NamedTuple):
    """An entry that was found, the name of the tier that had it, and what it may be used for."""

    entry: Entry
    tier: str
    state: State
    refresh: bool = False
    """Whether a new answer should be made now, whatever this one may be used for."""


class _Seen(NamedTuple):
    depth: int
    """Of the tier in the chain."""
    value: bytes
    entry: Entry
    state: State


class ImportResult(StrEnum):
    """What became of an entry that was made elsewhere."""

    STORED = "stored"
    UNCHANGED = "unchanged"
    """It is held already."""
    OLDER = "older"
    """One is held that was stored later, or another one that was stored then."""
    PURGED = "purged"
    REFUSED = "refused"
    """It is too large, or no tier could store it."""


class Chain:
    """Tiers in order, nearest first.

    Args:
        tiers: each is asked only when those before it missed.
        frequency: counts how often each key is asked for.
        max_answer_bytes: a larger answer isn't stored.
        promote_after: a hit is copied to nearer tiers once it was asked for so often, and more
            often than what it would push out there, or where an older entry is there.
        copies: those under way between the tiers; the demotion's own, if there is one.
        purges: what is purged; by default what this process purges, until it ends.
        shared_purges: tells other machines, if there is a shared tier.
        write: whether a new answer is stored in all tiers, or in the nearest and the shared.
        ttl_jitter: by up to this part is each ttl cut by chance, so that what was stored together
            doesn't expire together.
        clock: returns Unix seconds.
        chance: returns a number from 0 to below 1.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        frequency: FrequencySketch,
        max_answer_bytes: int,
        promote_after: int = 2,
        copies: Transfers | None = None,
        purges: Purges | None = None,
        shared_purges: SharedPurges | None = None,
        write: WritePolicy = WritePolicy.ON_INSERT,
        ttl_jitter: float = 0,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random,
    ) -> None:
        self.tiers = tuple(tiers)
        self._own = tuple(tier for tier in tiers if not tier.shared)
        self._shared = tuple(tier for tier in tiers if tier.shared)
        self._frequency = frequency
        self._write = write
        self._promotion = Promotion(
            frequency, promote_after=promote_after, max_bytes=_PROMOTION_BYTES, clock=clock
        )
        self._copies = Transfers() if copies is None else copies
        self.purges = Purges(clock=clock) if purges is None else purges
        self._shared_purges = shared_purges
        self.purged = 0
        """How often something was purged through this chain."""
        self.max_answer_bytes = max_answer_bytes
        self.ttl_jitter = ttl_jitter
        self.clock = clock
        self._chance = chance

    @property
    def promotions_dropped(self) -> int:
        """How many promotions found no room in the queue."""
        return self._promotion.dropped

    @property
    def purge_errors(self) -> int:
        """How many looks at what other machines have purged failed."""
        return 0 if self._shared_purges is None else self._shared_purges.errors

    async def lookup(self, key: str) -> Hit | None:
        """Return the entry under `key`, which may be promoted for it. Counts as asking for it.

        What isn't fresh any more in a near tier may have been renewed in one that others share, so
        then the farther tiers are asked too, and the latest entry counts.
        """
        asked = self._frequency.record(key)
        await self._know_purges()
        best = None
        if self.tiers and (found := await self.tiers[0].get(key, self.purges)) is not None:
            value, entry = found
            now = self.clock()
            state = entry.state(now)
            if state is State.FRESH:
                # Nearly every hit ends here, and pays for each call.
                refresh = self._is_refreshed_early(entry, now)
                return Hit(entry, self.tiers[0].name, state, refresh)
            best = None if state is State.EXPIRED else _Seen(0, value, entry, state)
        if len(self.tiers) > 1:
            best = await self._look_farther(key, best, asked)
        if best is None:
            return None
        depth, _, entry, state = best
        refresh = state is State.STALE_WHILE_REVALIDATE or self._is_refreshed_early(
            entry, self.clock()
        )
        return Hit(entry, self.tiers[depth].name, state, refresh)

    async def find_newer(self, key: str, than: float) -> Answer | None:
        """Return the fresh answer under `key` that another process stored after `than` (Unix s).

        Doesn't count as asking for it. It replaces what nearer tiers hold under `key`.
        """
        await self._know_purges()
        with self._copies.begin(key) as copy:
            for depth, tier in enumerate(self.tiers):
                found = await tier.get(key, self.purges, counted=False)
                if found is None:
                    continue
                value, entry = found
                now = self.clock()
                if entry.stored_at > than and entry.state(now) is State.FRESH:
                    async with copy.writing() as is_latest:
                        for nearer in self.tiers[:depth] if is_latest else ():
                            if await nearer.holds(key):
                                await nearer.put(key, value, entry.kept_until - now)
                    return entry.answer
        return None

    def provenance(self, labels: Iterable[str] = ()) -> Provenance:
        """Return what `store` must be told of an answer whose making begins now.

        `labels` are those by which it may be purged, such as `model:m`, beside its key.
        """
        return self.purges.provenance(labels)

    async def store(
        self,
        key: str,
        answer: Answer,
        freshness: Freshness,
        *,
        provenance: Provenance | None = None,
        generation_s: float = 0,
        age_s: float = 0,
    ) -> bool:
        """Store a finished answer. Returns whether any tier holds it.

        When this returns, each tier has done what its durability promises. An answer whose `origin`
        is purged by now isn't stored; without one, its making begins and ends now. `took_s` are the
        seconds that it took to generate, and `age_s` those that another cache has kept it.
        """
        if len(answer.content) + len(answer.trailer) > self.max_answer_bytes:
            return False
        provenance = self.provenance() if provenance is None else provenance
        if self.purges.is_known_purged(key, provenance):
            return False
        now = self.clock()
        made = now - age_s
        ttl_s = freshness.ttl_s * (1 - self.ttl_jitter * self._chance())
        entry = Entry(
            answer,
            made,
            made + ttl_s,
            generation_s,
            freshness.stale_while_revalidate_s,
            freshness.stale_if_error_s,
            *provenance,
        )
        value = entry.encode()
        left_s = entry.kept_until - now
        if left_s <= 0:
            return False
        async with self._copies.storing(key):
            stored = False
            if self._write is WritePolicy.ON_EVICT:
                stored = await self._store_nearest(key, value, left_s)
            for tier in self._shared if self._write is WritePolicy.ON_EVICT else self.tiers:
                stored = await tier.put(key, value, left_s) or stored
            return stored

    def frequency(self, key: str) -> int:
        """Return how often `key` was asked for lately, as far as it is known."""
        return self._frequency.estimate(key)

    async def peek(self, key: str) -> Entry | None:
        """Return the entry that `lookup` would find, which doesn't count as asking for it."""
        await self._know_purges()
        best: Entry | None = None
        for tier in self.tiers:
            if tier.shared and self.purges.shared_unknown:
                continue
            entry = await tier.peek(key)
            if entry is None or self.purges.is_purged(key, entry):
                continue
            state = entry.state(self.clock())
            if state is not State.EXPIRED and (best is None or entry.stored_at > best.stored_at):
                best = entry
            if best is not None and best.state(self.clock()) is State.FRESH:
                break
        return best

    async def import_entry(self, key: str, entry: Entry, into: Sequence[Tier]) -> ImportResult:
        """Store an entry that was made elsewhere, unless one is held that is as new.

        It is purged by what was purged here after its making began, by its own clock.
        """
        if len(entry.answer.content) + len(entry.answer.trailer) > self.max_answer_bytes:
            return ImportResult.REFUSED
        began_us = int((entry.stored_at - entry.generation_s) * 1e6)
        known = self.provenance().purge_epoch
        entry = entry._replace(purge_epoch=min(max(entry.purge_epoch, began_us), known))
        if self.purges.is_purged(key, entry):
            return ImportResult.PURGED
        value, stored, is_held = entry.encode(), False, False
        async with self._copies.storing(key):
            # A farther tier may hold a newer entry than a nearer one.
            async for held in self._held(key):
                # The purges that an entry has outlived are another matter in each place.
                is_same = held._replace(purge_epoch=entry.purge_epoch) == entry
                if held.stored_at >= entry.stored_at and not is_same:
                    return ImportResult.OLDER
                is_held = is_held or is_same
            if is_held:
                return ImportResult.UNCHANGED
            for tier in self.tiers:
                left_s = entry.kept_until - self.clock()
                if tier not in into or left_s <= 0:
                    await tier.remove(key)
                else:
                    stored = await tier.put(key, value, left_s) or stored
        return ImportResult.STORED if stored else ImportResult.REFUSED

    async def purge(self, *labels: str) -> None:
        """Purge all entries with one of `labels`: `all`, or such as `key:…` (`tiers.purges.KINDS`).

        When this returns no tier gives them out again, nor any answer whose making had begun, in
        no process on the same disk tier, nor on another machine with the same shared tier. None of
        the labels is purged without the others.

        Raises:
            ValueError: one isn't a label, or they are more than `MAX_LABELS`.
            PurgeError: it could not be made to last, or others could not be told.
        """
        self.purged += 1
        await (self._shared_purges or self.purges).purge(*labels)

    async def drain(self) -> None:
        """Finish the promotions that are under way."""
        await self._promotion.drain()

    async def close(self) -> None:
        """Finish promotions, then flush and close the tiers, nearest first."""
        await self.drain()
        await self.purges.close()
        for tier in self.tiers:
            await tier.close()

    async def _know_purges(self) -> None:
        """Know what other machines have purged, also if this process stood still meanwhile."""
        if (shared := self._shared_purges) is not None and shared.is_behind:
            await shared.catch_up()

    async def _held(self, key: str) -> AsyncIterator[Entry]:
        """Yield what the tiers hold under `key` and may give out, nearest first."""
        for tier in self.tiers:
            entry = await tier.peek(key)
            if entry is None or self.purges.is_purged(key, entry):
                continue
            if entry.state(self.clock()) is not State.EXPIRED:
                yield entry

    async def _store_nearest(self, key: str, value: bytes, ttl_s: float) -> bool:
        # What farther tiers hold is older, and would be found once the nearest has evicted this.
        for tier in self._own[1:]:
            await tier.remove(key)
        for tier in self._own:
            if await tier.put(key, value, ttl_s):
                return True
        return False

    async def _look(self, depth: int, key: str) -> _Seen | None:
        found = await self.tiers[depth].get(key, self.purges)
        if found is None:
            return None
        value, entry = found
        state = entry.state(self.clock())
        return None if state is State.EXPIRED else _Seen(depth, value, entry, state)

    async def _look_farther(self, key: str, best: _Seen | None, asked: int) -> _Seen | None:
        """Ask the tiers behind the nearest, in which `best` was seen, and promote what is found."""
        copy: Transfer | None = self._copies.begin(key)
        older_in = [] if best is None else [self.tiers[0]]
        try:
            for depth in range(1, len(self.tiers)):
                seen = await self._look(depth, key)
                if seen is None:
                    continue
                if best is None or seen.entry.stored_at > best.entry.stored_at:
                    best = seen
                if best.state is State.FRESH:
                    break
                older_in.append(self.tiers[depth])
            if copy is not None and best is not None and best.depth > 0:
                found = FarHit(key, best.value, best.entry, asked, older_in)
                taken, copy = copy, None
                await self._promotion.promote(taken, found, self.tiers[: best.depth])
            return best
        finally:
            if copy is not None:
                copy.release()

    def _is_refreshed_early(self, entry: Entry, now: float) -> bool:
        """Choose by chance, the more likely the closer the expiry and the dearer the answer.

        So one request of many refreshes what is asked for often, before it expires for all
        (Vattani et al., «Optimal Probabilistic Cache Stampede Prevention», 2015).
        """
        left_s = entry.expires_at - now
        # The logarithm is beyond 40 once in 10^17 times.
        return 0 < left_s < 40 * entry.generation_s and left_s < -entry.generation_s * log(
            1 - self._chance()
        )
