"""Looking at the entries of tiers without asking for them: one, a page, or all."""

from collections.abc import Iterator, Sequence
from itertools import chain as joined
from math import inf
from typing import Any

from server.admin.operations import MAX_PAGE, AdminError, Query
from server.admin.pace import Pace
from tiers import Chain, DiskCache, Entry, State, Tier
from tiers.backend import ByteCache

# A page of what is rare ends after so many others.
_SCANNED = 10_000
_AFTER = "after should be as the page before gave it"


class Listing:
    """The entries of those tiers that can tell them.

    Args:
        chain: to which the tiers belong.
        tiers: nearest first.
    """

    def __init__(self, chain: Chain, tiers: Sequence[Tier]) -> None:
        self._chain = chain
        self._backends = {t.name: t.backend for t in tiers if isinstance(t.backend, ByteCache)}

    def backends(self) -> list[ByteCache]:
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
        return entry if entry is not None and self.is_alive(key, entry) else None

    def is_alive(self, key: str, entry: Entry) -> bool:
        """Return whether an entry may still be given out."""
        is_purged = self._chain.purges.cover(key, entry)
        return not is_purged and entry.state(self._chain.clock()) is not State.EXPIRED

    def row(self, key: str, entry: Entry) -> dict[str, Any]:
        """Return what is told of an entry."""
        now = self._chain.clock()
        return {
            "key": key,
            "tiers": [name for name, backend in self._backends.items() if backend.holds(key)],
            "bytes": len(entry.answer.content) + len(entry.answer.usage),
            "age_s": round(now - entry.stored_at, 3),
            "ttl_s": round(entry.expires_at - now, 3),
            "state": entry.state(now).name.lower(),
            "frequency": self._chain.frequency(key),
            "labels": list(entry.labels),
        }

    async def page(self, query: Query) -> dict[str, Any]:
        """Return a page as `Operations.page` describes it.

        Raises:
            AdminError: the query is wrong.
        """
        self.backends()
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
        self, backend: ByteCache, query: Query, rows: list[dict[str, Any]]
    ) -> str:
        """Add the entries that are asked for most; return where that ended, nothing at the end."""
        after, pace = _place(query.after), Pace()
        found: list[tuple[float, str]] = []
        keys = backend.keys()
        for key in keys:
            place = (-self._chain.frequency(key), key)
            if place > after and self._matches(backend, key, query):
                found.append(place)
                if len(found) > query.limit + MAX_PAGE:
                    found = sorted(found)[: query.limit + 1]
            await pace.give_way()
        found.sort()
        for _, key in found[: query.limit]:
            if (entry := self.peek(backend, key)) is not None:
                rows.append(self.row(key, entry))
        if len(found) <= query.limit:
            return ""
        last = found[query.limit - 1]
        return f"{-last[0]:.0f}:{last[1]}"

    async def _page_of_disk(
        self,
        disk: DiskCache,
        query: Query,
        nearer: Sequence[ByteCache],
        rows: list[dict[str, Any]],
    ) -> str:
        """Add what nearer tiers don't hold; return where that ended, nothing at the end."""
        pace, left, at = Pace(), query.limit, query.after
        for scanned, (place, key) in enumerate(_places(disk, query)):
            if not left or scanned == _SCANNED:
                return at
            at = place
            if not any(near.holds(key) for near in nearer):
                entry = self.peek(disk, key)
                if entry is not None and query.label in ("", *entry.labels):
                    rows.append(self.row(key, entry))
                    left -= 1
            await pace.give_way()
        return ""

    def _matches(self, backend: ByteCache, key: str, query: Query) -> bool:
        if not key.startswith(query.prefix):
            return False
        if not query.label:
            # What is expired or purged is found out when the page is made.
            return True
        entry = self.peek(backend, key)
        return entry is not None and query.label in entry.labels


def _places(disk: DiskCache, query: Query) -> Iterator[tuple[str, str]]:
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
    for each in disk.ranked(below):
        yield each.rank.hex(), each.key.decode()


def _place(after: str) -> tuple[float, str]:
    if not after:
        return -inf, ""
    frequency, _, key = after.partition(":")
    try:
        return -int(frequency), key
    except ValueError as exc:
        raise AdminError(400, _AFTER, param="after") from exc
