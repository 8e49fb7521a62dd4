"""Listings of the tiers' entries, which do not count as requests for them."""

import asyncio
from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import chain as joined
from math import inf
from typing import Any

from server.admin.operations import AdminError, EntryQuery
from server.admin.time_slice import TimeSlice
from tiers import Chain, Entry, State, Tier
from tiers.backend import ByteCache

# A page of disk entries ends after so many keys, however few of them match.
_MAX_SCANNED = 10_000
# Keys are sorted in chunks of this size, each in less than a millisecond.
_SORTED = 1000
# Walks over memory that are kept for their next page, each with a reference to every key.
_MAX_WALKS, _WALK_LIFETIME_S = 4, 60
_AFTER = "after should be as the page before gave it"

_STATES = {
    State.FRESH: "fresh",
    State.STALE_WHILE_REVALIDATE: "stale",
    State.STALE_IF_ERROR: "fallback",
    State.EXPIRED: "expired",
}
"""What a state is called in the admin API."""


class EntryListing:
    """The entries of those tiers that can list them.

    Args:
        chain: the tiers' chain.
        tiers: nearest first.
    """

    def __init__(self, chain: Chain, tiers: Sequence[Tier]) -> None:
        self._chain = chain
        self._backends = {t.name: t.local for t in tiers if t.local is not None}
        self._walks: dict[EntryQuery, Iterator[tuple[int, str]]] = {}

    def open_backends(self) -> list[ByteCache]:
        """Return the backends of the tiers, nearest first.

        Raises:
            AdminError: one of them is still being opened.
        """
        backends = list(self._backends.values())
        if not all(each.is_open for each in backends):
            raise AdminError(503, "The disk tier is being opened; try again.")
        return backends

    def peek(self, backend: ByteCache, key: str) -> Entry | None:
        """Return an entry of a tier, unless it may no longer be served."""
        held = backend.peek(key)
        try:
            entry = None if held is None else Entry.decode(held[0])
        except ValueError:
            # Another version of tierserve has stored it.
            return None
        return entry if entry is not None and self.is_servable(key, entry) else None

    def is_servable(self, key: str, entry: Entry) -> bool:
        """Return whether an entry may still be served: it is neither purged nor expired."""
        is_purged = self._chain.purges.is_purged(key, entry)
        return not is_purged and entry.state(self._chain.clock()) is not State.EXPIRED

    def describe(self, key: str, entry: Entry, of: ByteCache | None = None) -> dict[str, Any]:
        """Return an entry's row of a page; `of` is a tier that is known to hold it."""
        now = self._chain.clock()
        return {
            "key": key,
            "tiers": self.tiers_with(key, of),
            "bytes": len(entry.answer.content) + len(entry.answer.trailer),
            "age_s": round(now - entry.stored_at, 3),
            "ttl_s": round(entry.expires_at - now, 3),
            "state": _STATES[entry.state(now)],
            "frequency": self._chain.frequency(key),
            "labels": list(entry.labels),
        }

    def tiers_with(self, key: str, known: ByteCache | None = None) -> list[str]:
        """Return the names of the tiers that hold an entry; `known` is one that does."""
        return [n for n, each in self._backends.items() if each is known or each.holds(key)]

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        """Return a page as `AdminOperations.page` describes it.

        Raises:
            AdminError: the query is wrong.
        """
        self.open_backends()
        names = [name for name in self._backends if query.tier in ("", name)]
        if query.tier and not names:
            known = ", ".join(self._backends)
            raise AdminError(400, f"tier should be one of {known}.", param="tier")
        name, _, at = query.after.partition(":")
        if query.after and name not in names:
            raise AdminError(400, _AFTER, param="after")
        rows: list[dict[str, Any]] = []
        start = names.index(name) if query.after else 0
        for number, name in enumerate(names[start:], start):
            if len(rows) == query.limit:
                return {"entries": rows, "after": f"{name}:"}
            backend = self._backends[name]
            nearer = [self._backends[each] for each in names[:number]]
            part = query._replace(after=at, limit=query.limit - len(rows))
            at = (
                await self._page_of_disk(backend, part, nearer, rows)
                if backend.is_ordered
                else await self._page_of_memory(backend, part, rows)
            )
            if at:
                return {"entries": rows, "after": f"{name}:{at}"}
        return {"entries": rows, "after": None}

    async def _page_of_memory(
        self, backend: ByteCache, query: EntryQuery, rows: list[dict[str, Any]]
    ) -> str:
        """Add the most frequently requested entries; return the next `after`, empty at the end."""
        walk = self._walks.pop(query._replace(limit=0), None)
        if walk is None:
            walk = await self._walk(backend, query)
        left, time_slice = query.limit, TimeSlice()
        for frequency, key in walk:
            # Entries that have gone since the walk began leave the page shorter.
            left -= 1
            if (entry := self.peek(backend, key)) is not None:
                rows.append(self.describe(key, entry, backend))
            await time_slice.yield_if_over()
            if not left:
                after = f"{frequency}:{key}"
                self._keep_walk(query._replace(limit=0, after=after), walk)
                return after
        return ""

    async def _walk(self, backend: ByteCache, query: EntryQuery) -> Iterator[tuple[int, str]]:
        """Return frequency and key of the entries after `query.after`, in their order.

        Keys are sorted in chunks and merged lazily, so that the event loop never waits long.
        """
        (below, after), time_slice = _parse_memory_place(query.after), TimeSlice()
        chunks: dict[int, list[list[str]]] = {}
        keys = backend.keys()
        for key in keys:
            frequency = self._chain.frequency(key)
            is_after = frequency < below or (frequency == below and key > after)
            if is_after and self._matches(backend, key, query):
                of_frequency = chunks.setdefault(frequency, [[]])
                of_frequency[-1].append(key)
                if len(of_frequency[-1]) == _SORTED:
                    of_frequency[-1].sort()
                    of_frequency.append([])
            await time_slice.yield_if_over()
        for of_frequency in chunks.values():
            of_frequency[-1].sort()
            await time_slice.yield_if_over()
        return (
            (frequency, key) for frequency in sorted(chunks, reverse=True)
            for key in merge(*chunks[frequency])
        )  # fmt: skip

    def _keep_walk(self, query: EntryQuery, walk: Iterator[tuple[int, str]]) -> None:
        """Keep a walk for the next page of its query, which then need not sort all keys again."""
        while len(self._walks) >= _MAX_WALKS:
            del self._walks[next(iter(self._walks))]
        self._walks[query] = walk
        # The timer refers to the query only, so that a walk that was replaced is freed.
        asyncio.get_running_loop().call_later(_WALK_LIFETIME_S, self._walks.pop, query, None)

    async def _page_of_disk(
        self,
        disk: ByteCache,
        query: EntryQuery,
        nearer: Sequence[ByteCache],
        rows: list[dict[str, Any]],
    ) -> str:
        """Add entries that no nearer tier holds; return the next `after`, empty at the end."""
        time_slice, left, at = TimeSlice(), query.limit, query.after
        for scanned, (place, key) in enumerate(_disk_places(disk, query)):
            if not left or scanned == _MAX_SCANNED:
                return at
            at = place
            if not any(near.holds(key) for near in nearer):
                entry = self.peek(disk, key)
                if entry is not None and query.label in ("", *entry.labels):
                    rows.append(self.describe(key, entry, disk))
                    left -= 1
            await time_slice.yield_if_over()
        return ""

    def _matches(self, backend: ByteCache, key: str, query: EntryQuery) -> bool:
        if not key.startswith(query.prefix):
            return False
        if not query.label:
            # `_page_of_memory` drops expired and purged entries.
            return True
        entry = self.peek(backend, key)
        return entry is not None and query.label in entry.labels


def _disk_places(disk: ByteCache, query: EntryQuery) -> Iterator[tuple[str, str]]:
    """Yield place and key of each entry after `query.after`: by key with a prefix, else by rank."""
    if query.prefix:
        # `keys_after` begins after its argument, but the prefix may be a key itself.
        first = [] if query.after else [query.prefix]
        for key in joined(first, disk.keys_after(query.after or query.prefix)):
            if not key.startswith(query.prefix):
                return
            yield key, key
        return
    try:
        below = bytes.fromhex(query.after) if query.after else None
    except ValueError as exc:
        raise AdminError(400, _AFTER, param="after") from exc
    for rank, key in disk.ranked_keys(below):
        yield rank.hex(), key


def _parse_memory_place(after: str) -> tuple[float, str]:
    """Return the frequency and the key at which the previous page ended."""
    if not after:
        return inf, ""
    frequency, _, key = after.partition(":")
    try:
        return int(frequency), key
    except ValueError as exc:
        raise AdminError(400, _AFTER, param="after") from exc
