"""The chain of tiers: lookup from the nearest, promotion of entries requested often, and storing.

Invariant: a lookup returns the entry last stored under its key, unless that is purged or expired.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import StrEnum
from itertools import takewhile
from math import log
from random import random
from typing import NamedTuple

from tiers.entry import SKEW_S, Answer, Entry, Freshness, Provenance, State
from tiers.frequency import FrequencySketch
from tiers.movement.demotion import WritePolicy
from tiers.movement.promotion import FarHit, Promotion
from tiers.movement.transfers import Transfer, Transfers
from tiers.purges.purges import Purges
from tiers.shared.purges import SharedPurges
from tiers.tier import Tier

# Promotions that wait for the disk.
_PROMOTION_BYTES = 16 * 1024**2
# An answer is refreshed early by at most this many times its generation time: the logarithm of a
# random number exceeds 40 once in 10^17 times.
_EARLIEST = 40
_FRESH = State.FRESH
# Calling a `NamedTuple` class would be a call more for each hit.
_new = tuple.__new__


class Hit(NamedTuple):
    """An entry that was found, the tier that held it, and what it may be used for."""

    entry: Entry
    tier: str
    state: State
    refresh: bool = False
    """Whether a new answer should be generated now, whatever this one may be used for."""


class _Found(NamedTuple):
    depth: int
    """Of its tier in the chain."""
    entry: Entry
    state: State


class ImportResult(StrEnum):
    """What became of an entry that was imported."""

    STORED = "stored"
    UNCHANGED = "unchanged"
    """A tier holds the same entry."""
    OLDER = "older"
    """A tier holds an entry that was stored later, or another one of the same time."""
    PURGED = "purged"
    REFUSED = "refused"
    """It is too large, or no tier stored it."""


class Chain:
    """Tiers in order, nearest first.

    Args:
        tiers: each is looked up only where those before it missed.
        frequency: counts how often each key is requested.
        max_answer_bytes: a larger answer isn't stored.
        promote_after: requests after which a hit is copied to nearer tiers, if it is requested more
            often than what it would evict there; at once where an older entry is there.
        transfers: those under way between the tiers, shared with `Demotion` if there is one.
        purges: the purges that hide entries; by default those of this process, until it ends.
        shared_purges: exchanges purges with other machines, if there is a shared tier.
        write: whether a new answer is stored in all tiers, or in the nearest and the shared one.
        ttl_jitter: each ttl is cut by a random part of up to this share, so that answers that were
            stored together don't expire together.
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
        transfers: Transfers | None = None,
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
        self._at_once = tuple(takewhile(lambda tier: tier.local is not None, tiers))
        self._frequency = frequency
        self._write = write
        self._promotion = Promotion(
            frequency, promote_after=promote_after, max_bytes=_PROMOTION_BYTES, clock=clock
        )
        self._transfers = Transfers() if transfers is None else transfers
        self.purges = Purges(clock=clock) if purges is None else purges
        self._shared_purges = shared_purges
        self.purged = 0
        """How many purges went through this chain."""
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
        """How many exchanges of purges with other machines failed."""
        return 0 if self._shared_purges is None else self._shared_purges.errors

    def is_available(self, tier: Tier) -> bool:
        """Return whether a tier is asked, which it isn't while it fails or its purges do."""
        return tier.available and not (tier.shared and self.purges.shared_unknown)

    def find_at_once(self, key: str, encoding: int, now: float) -> Hit | None:
        """Return a fresh entry that a tier of this process holds, and count the request.

        Where there is more to do it returns `None`, and has counted nothing: `lookup` does it. So
        it is if nothing is found, if other machines may have purged, or if the entry is to be
        refreshed or promoted, or has another encoding.
        """
        if (shared := self._shared_purges) is not None and shared.is_behind:
            return None
        for depth, tier in enumerate(self._at_once):
            entry = tier.find_at_once(key, now, self.purges)
            if entry is None:
                continue
            if entry.stored_at > now + SKEW_S or entry.answer.encoding != encoding:
                return None
            if now >= entry.expires_at - _EARLIEST * entry.generation_s:
                return None
            if depth and self._may_promote(key, entry, depth):
                return None
            self._frequency.record(key)
            if depth:
                for nearer in self._at_once[:depth]:
                    nearer.counts.misses += 1
            tier.counts.hits += 1
            tier.note_read(key)
            return _new(Hit, (entry, tier.name, _FRESH, False))
        return None

    async def lookup(self, key: str) -> Hit | None:
        """Return the entry under `key`, and count the request; the entry may be promoted.

        Another process may have renewed an entry that is stale in a near tier. So then the farther
        tiers are looked up too, and the latest entry counts.
        """
        asked = self._frequency.record(key)
        if self._shared_purges is not None:
            await self._catch_up_purges()
        best = None
        if self.tiers and (entry := await self.tiers[0].get(key, self.purges)) is not None:
            now = self.clock()
            state = entry.state(now)
            if state is _FRESH:
                refresh = self._is_refreshed_early(entry, now)
                return Hit(entry, self.tiers[0].name, state, refresh)
            best = None if state is State.EXPIRED else _Found(0, entry, state)
        if len(self.tiers) > 1:
            best = await self._lookup_farther(key, best, asked)
        if best is None:
            return None
        depth, entry, state = best
        refresh = state is State.STALE_WHILE_REVALIDATE or self._is_refreshed_early(
            entry, self.clock()
        )
        return Hit(entry, self.tiers[depth].name, state, refresh)

    async def find_newer(self, key: str, than: float) -> Answer | None:
        """Return the fresh answer under `key` that another process stored after `than` (Unix s).

        It replaces what nearer tiers hold under `key`, and doesn't count as a request.
        """
        await self._catch_up_purges()
        with self._transfers.begin(key) as transfer:
            for depth, tier in enumerate(self.tiers):
                entry = await tier.get(key, self.purges, counted=False)
                if entry is None:
                    continue
                now = self.clock()
                if entry.stored_at > than and entry.state(now) is State.FRESH:
                    async with transfer.writing() as is_latest:
                        for nearer in self.tiers[:depth] if is_latest else ():
                            if await nearer.holds(key):
                                left_s = entry.kept_until - now
                                await nearer.put(key, entry.encode(), left_s)
                    return entry.answer
        return None

    def provenance(self, labels: Iterable[str] = ()) -> Provenance:
        """Return the provenance of an answer whose generation begins now, for `store`.

        `labels` are those by which it may be purged, such as `tag:faq`, beside its key.
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

        When this returns, each tier has done what its durability promises.

        Args:
            key: under which it is stored.
            answer: is refused if it is larger than `max_answer_bytes`.
            freshness: how long it is good for.
            provenance: decides whether it was purged meanwhile, and then isn't stored; by default
                its generation begins and ends now.
            generation_s: seconds that it took to generate.
            age_s: seconds for which another cache has kept it.
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
        async with self._transfers.storing(key):
            stored = False
            if self._write is WritePolicy.ON_EVICT:
                stored = await self._store_nearest(key, value, left_s)
            for tier in self._shared if self._write is WritePolicy.ON_EVICT else self.tiers:
                stored = await self._put(tier, key, value, left_s) or stored
            return stored

    def frequency(self, key: str) -> int:
        """Return an estimate of how often `key` was requested lately."""
        return self._frequency.estimate(key)

    async def peek(self, key: str) -> Entry | None:
        """Return the entry that `lookup` would find, without counting a request."""
        await self._catch_up_purges()
        best: Entry | None = None
        async for entry in self._held(key):
            if best is None or entry.stored_at > best.stored_at:
                best = entry
            if best.state(self.clock()) is State.FRESH:
                break
        return best

    async def import_entry(self, key: str, entry: Entry, into: Sequence[Tier]) -> ImportResult:
        """Store an entry of another cache in the tiers `into`, unless one is held that is as new.

        A purge here that came after its generation began, by its own clock, purges it.
        """
        if len(entry.answer.content) + len(entry.answer.trailer) > self.max_answer_bytes:
            return ImportResult.REFUSED
        began_us = int((entry.stored_at - entry.generation_s) * 1e6)
        known = self.provenance().purge_epoch
        entry = entry._replace(purge_epoch=min(max(entry.purge_epoch, began_us), known))
        if self.purges.is_purged(key, entry):
            return ImportResult.PURGED
        value, stored, is_held = entry.encode(), False, False
        async with self._transfers.storing(key):
            # A farther tier may hold a newer entry than a nearer one.
            async for held in self._held(key):
                # Each place numbers its purges by itself.
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
                    stored = await self._put(tier, key, value, left_s) or stored
        return ImportResult.STORED if stored else ImportResult.REFUSED

    async def purge(self, *labels: str) -> None:
        """Purge all entries with one of `labels`: `all`, or such as `key:…` (`tiers.purges.table`).

        When this returns, no process on the same disk tier and no machine with the same shared tier
        serves them, nor any answer whose generation had begun. Either all of the labels are purged
        or none.

        Raises:
            ValueError: one isn't a label, or they are more than `MAX_LABELS`.
            PurgeError: the purge holds in this process, but perhaps not in others or for good.
        """
        self.purged += 1
        await (self._shared_purges or self.purges).purge(*labels)

    async def drain(self) -> None:
        """Wait for the promotions that are under way."""
        await self._promotion.drain()

    async def close(self) -> None:
        """Drain promotions, then flush and close the tiers, nearest first."""
        await self.drain()
        await self.purges.close()
        for tier in self.tiers:
            await tier.close()

    async def _catch_up_purges(self) -> None:
        """Take over the purges of other machines if this process may have missed any."""
        if (shared := self._shared_purges) is not None and shared.is_behind:
            await shared.catch_up()

    async def _held(self, key: str) -> AsyncIterator[Entry]:
        """Yield what the tiers hold under `key` and may serve, nearest first."""
        for tier in self.tiers:
            if not self.is_available(tier):
                continue
            entry = await tier.peek(key)
            if entry is None or self.purges.is_purged(key, entry):
                continue
            if entry.state(self.clock()) is not State.EXPIRED:
                yield entry

    async def _put(self, tier: Tier, key: str, value: bytes, left_s: float) -> bool:
        # Others would take it for newer than purges that this process doesn't know, or has learned
        # only since other tiers began to store it.
        if tier.shared and (
            self.purges.shared_unknown or self.purges.is_encoded_known_purged(key, value)
        ):
            tier.forgo(key, value)
            return False
        return await tier.put(key, value, left_s)

    async def _store_nearest(self, key: str, value: bytes, ttl_s: float) -> bool:
        # An older entry in a farther tier would be found once the nearest has evicted this one.
        for tier in self._own[1:]:
            await tier.remove(key)
        for tier in self._own:
            if await tier.put(key, value, ttl_s):
                return True
        return False

    async def _lookup_in(self, depth: int, key: str) -> _Found | None:
        entry = await self.tiers[depth].get(key, self.purges)
        if entry is None:
            return None
        state = entry.state(self.clock())
        return None if state is State.EXPIRED else _Found(depth, entry, state)

    def _may_promote(self, key: str, entry: Entry, depth: int) -> bool:
        """Whether one more request promotes an entry that the tier at `depth` holds."""
        requested = self._frequency.estimate_after(key)
        nearer = self._at_once[:depth]
        return any(self._promotion.is_worth(entry, requested, tier) for tier in nearer)

    async def _lookup_farther(self, key: str, best: _Found | None, asked: int) -> _Found | None:
        """Look up the tiers behind the nearest, where `best` was found, and promote a find."""
        transfer: Transfer | None = self._transfers.begin(key)
        older_in = [] if best is None else [self.tiers[0]]
        try:
            for depth in range(1, len(self.tiers)):
                found = await self._lookup_in(depth, key)
                if found is None:
                    continue
                if best is None or found.entry.stored_at > best.entry.stored_at:
                    best = found
                if best.state is State.FRESH:
                    break
                older_in.append(self.tiers[depth])
            if transfer is not None and best is not None and best.depth > 0:
                far_hit = FarHit(key, best.entry, asked, older_in)
                taken, transfer = transfer, None
                await self._promotion.promote(taken, far_hit, self.tiers[: best.depth])
            return best
        finally:
            if transfer is not None:
                transfer.release()

    def _is_refreshed_early(self, entry: Entry, now: float) -> bool:
        """Decide by chance, the likelier the closer the expiry and the dearer the answer.

        So one request of many refreshes a popular answer before it expires for all of them
        (Vattani et al., «Optimal Probabilistic Cache Stampede Prevention», 2015).
        """
        left_s = entry.expires_at - now
        return 0 < left_s < -entry.generation_s * log(1 - self._chance())
