"""Looking at the entries of tiers without asking for them: one, a page, or all."""

import asyncio
from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import chain as joined
from math import inf
from typing import Any

from server.admin.operations import AdminError, EntryQuery
from server.admin.time_slice import TimeSlice
from tiers import Chain, DiskCache, Entry, State, Tier
from tiers.backend import ByteCache

# A page of what is rare ends after so many others.
_SCANNED = 10_000
# Keys that are sorted at once, in less than a millisecond.
_SORTED = 1000
# Lists of memory that are under way, each with a reference to every key, and how long they may be.
_WALKS, _KEPT_S = 4, 60
_AFTER = "after should be as the page before gave it"


class EntryListing:
    """The entries of those tiers that can tell them.

    Args:
        chain: to which the tiers belong.
        tiers: nearest first.
    """

    def __init__(self, chain: Chain, tiers: Sequence[Tier]) -> None:
        self._chain = chain
        self._backends = {t.name: t.backend for t in tiers if isinstance(t.backend, ByteCache)}
        self._walks: dict[EntryQuery, Iterator[tuple[int, str]]] = {}

    def open_backends(self) -> list[ByteCache]:
        """Return the backends of the tiers, nearest first.

        Raises:
            AdminError: one of them is still being opened.
        """
        backends = list(self._backends.values())
        if not all(each.is_open for each in backends if isinstance(each, DiskCache)):
            raise AdminError(503, "The disk tier is being opened; try again.")
        return backends

    def peek(self, backend: ByteCache, key: str) -> Entry | None:
        """Return what a tier holds and may still give out."""
        held = backend.peek(key)
        try:
            entry = None if held is None else Entry.decode(held[0])
        except ValueError:
            # Of another version of ours.
            return None
        return entry if entry is not None and self.is_servable(key, entry) else None

    def is_servable(self, key: str, entry: Entry) -> bool:
        """Return whether an entry may still be given out."""
        is_purged = self._chain.purges.is_purged(key, entry)
        return not is_purged and entry.state(self._chain.clock()) is not State.EXPIRED

    def describe(self, key: str, entry: Entry, of: ByteCache | None = None) -> dict[str, Any]:
        """Return what is told of an entry, which is held by `of` at least."""
        now = self._chain.clock()
        return {
            "key": key,
            "tiers": [n for n, each in self._backends.items() if each is of or each.holds(key)],
            "bytes": len(entry.answer.content) + len(entry.answer.trailer),
            "age_s": round(now - entry.stored_at, 3),
            "ttl_s": round(entry.expires_at - now, 3),
            "state": entry.state(now).name.lower(),
            "frequency": self._chain.frequency(key),
            "labels": list(entry.labels),
        }

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
                if isinstance(backend, DiskCache)
                else await self._page_of_memory(backend, part, rows)
            )
            if at:
                return {"entries": rows, "after": f"{name}:{at}"}
        return {"entries": rows, "after": None}

    async def _page_of_memory(
        self, backend: ByteCache, query: EntryQuery, rows: list[dict[str, Any]]
    ) -> str:
        """Add the entries that are asked for most; return where that ended, nothing at the end."""
        walk = self._walks.pop(query._replace(limit=0), None)
        if walk is None:
            walk = await self._walk(backend, query)
        left, pace = query.limit, TimeSlice()
        for frequency, key in walk:
            # What is gone, expired or purged since leaves a page shorter.
            left -= 1
            if (entry := self.peek(backend, key)) is not None:
                rows.append(self.describe(key, entry, backend))
            await pace.yield_if_over()
            if not left:
                after = f"{frequency}:{key}"
                self._keep(query._replace(limit=0, after=after), walk)
                return after
        return ""

    async def _walk(self, backend: ByteCache, query: EntryQuery) -> Iterator[tuple[int, str]]:
        """Return frequency and key of the entries after the query's place, in their order.

        Sorted piece by piece, and merged as they are asked for, so that nobody waits for it long.
        """
        (below, after), pace = _place(query.after), TimeSlice()
        pieces: dict[int, list[list[str]]] = {}
        keys = backend.keys()
        for key in keys:
            frequency = self._chain.frequency(key)
            is_after = frequency < below or (frequency == below and key > after)
            if is_after and self._matches(backend, key, query):
                of_frequency = pieces.setdefault(frequency, [[]])
                of_frequency[-1].append(key)
                if len(of_frequency[-1]) == _SORTED:
                    of_frequency[-1].sort()
                    of_frequency.append([])
            await pace.yield_if_over()
        for of_frequency in pieces.values():
            of_frequency[-1].sort()
            await pace.yield_if_over()
        return (
            (frequency, key) for frequency in sorted(pieces, reverse=True)
            for key in merge(*pieces[frequency])
        )  # fmt: skip

    def _keep(self, query: EntryQuery, walk: Iterator[tuple[int, str]]) -> None:
        """Keep a walk for the next page of its query; without it, all would be sorted anew."""
        while len(self._walks) >= _WALKS:
            del self._walks[next(iter(self._walks))]
        self._walks[query] = walk
        # A timer that knew the walk itself would keep it when others have taken its place.
        asyncio.get_running_loop().call_later(_KEPT_S, self._walks.pop, query, None)

    async def _page_of_disk(
        self,
        disk: DiskCache,
        query: EntryQuery,
        nearer: Sequence[ByteCache],
        rows: list[dict[str, Any]],
    ) -> str:
        """Add what nearer tiers don't hold; return where that ended, nothing at the end."""
        pace, left, at = TimeSlice(), query.limit, query.after
        for scanned, (place, key) in enumerate(_places(disk, query)):
            if not left or scanned == _SCANNED:
                return at
            at = place
            if not any(near.holds(key) for near in nearer):
                entry = self.peek(disk, key)
                if entry is not None and query.label in ("", *entry.labels):
                    rows.append(self.describe(key, entry, disk))
                    left -= 1
            await pace.yield_if_over()
        return ""

    def _matches(self, backend: ByteCache, key: str, query: EntryQuery) -> bool:
        if not key.startswith(query.prefix):
            return False
        if not query.label:
            # What is expired or purged is found out when the page is made.
            return True
        entry = self.peek(backend, key)
        return entry is not None and query.label in entry.labels


def _places(disk: DiskCache, query: EntryQuery) -> Iterator[tuple[str, str]]:
    """Yield the place and the key of each entry after the query's place."""
    if query.prefix:
        # The key that is the prefix comes before those after it.
        first = [] if query.after else [query.prefix]
        for key in joined(first, disk.sorted_keys(query.after or query.prefix)):
            if not key.startswith(query.prefix):
                return
            yield key, key
        return
    try:
        below = bytes.fromhex(query.after) if query.after else None
    except ValueError as exc:
        raise AdminError(400, _AFTER, param="after") from exc
    for rank, found in disk.ranked(below):
        yield rank.hex(), found.key.decode()


def _place(after: str) -> tuple[float, str]:
    if not after:
        return inf, ""
    frequency, _, key = after.partition(":")
    try:
        return int(frequency), key
    except ValueError as exc:
        raise AdminError(400, _AFTER, param="after") from exc
