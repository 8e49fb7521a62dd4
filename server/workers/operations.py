"""The admin operations on all processes: on the master's tiers, and on the workers' memory tiers.

The master has the disk, the shared and the prefix tier open, each worker a memory tier of its own.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import orjson

from server.admin import export_format
from server.admin.client import AdminClient
from server.admin.local import LocalOperations
from server.admin.operations import AdminError, AdminOperations, EntryQuery
from server.workers.child import WorkerProcess
from server.workers.link import CALL_S, Link, LinkError
from server.workers.merged_overview import merge_tiers
from tiers import MemoryCache

_MEMORY = MemoryCache.NAME
_Answer = TypeVar("_Answer")
_Place = tuple[int, str]
"""A row's place in a listing of memory: the most frequent first, then by key."""


class WorkersOperations(AdminOperations):
    """The operations.

    Args:
        local: on the tiers that the master has open.
        workers: all of them.
        has_memory: whether there is a memory tier.
        tells_workers: whether workers learn of purges only from us: without a disk tier.
        max_line_bytes: the longest line of an export.
    """

    def __init__(
        self,
        local: LocalOperations,
        workers: Sequence[WorkerProcess],
        *,
        has_memory: bool,
        tells_workers: bool,
        max_line_bytes: int,
    ) -> None:
        self._local, self._workers = local, workers
        self._has_memory, self._tells_workers = has_memory, tells_workers
        self._max_line_bytes = max_line_bytes

    async def stats(self) -> dict[str, Any]:
        own = await self._local.stats()
        of_workers = await self._ask(lambda client: client.stats())
        reports = [each["tiers"] for each in of_workers]
        return own | {"tiers": merge_tiers([*reports, own["tiers"]])}

    async def chains(self, limit: int, label: str = "") -> dict[str, Any]:
        return await self._local.chains(limit, label)

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        tier = query.after.partition(":")[0]
        if self._has_memory and query.tier in ("", _MEMORY) and tier in ("", _MEMORY):
            rows, after = await self._page_of_memory(query)
            if after or query.tier == _MEMORY:
                return {"entries": rows, "after": after}
            query = query._replace(after="", limit=query.limit - len(rows))
            if not query.limit:
                # The next page begins with the next tier; without one, it is empty.
                return {"entries": rows, "after": f"{_MEMORY}:-1:"}
        page = await self._local.page(query)
        held = await self._held([row["key"] for row in page["entries"]])
        for row in page["entries"]:
            if row["key"] in held:
                row["tiers"] = [_MEMORY, *row["tiers"]]
        listed = [row for row in page["entries"] if query.tier or row["key"] not in held]
        return {"entries": [*rows, *listed], "after": page["after"]}

    async def entry(self, key: str) -> dict[str, Any]:
        found = await self._ask(partial(_entry_if_any, key))
        found += [await _entry_if_any(key, self._local)]
        held = [each for each in found if each is not None]
        if not held:
            raise AdminError(404, "There is no entry under this key.", param="key")
        newest = max(held, key=lambda each: float(each["stored_at"]))
        tiers = dict.fromkeys(tier for each in held for tier in each["tiers"])
        return newest | {"tiers": [*tiers]}

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        try:
            labels = await self._local.purge(kind, names)
        except AdminError as exc:
            # Where the disk can't keep it, the purge holds in each process that knows it.
            if exc.status >= 500:
                await self._ask(lambda client: client.purge(kind, names))
            raise
        if self._tells_workers:
            await self._ask(lambda client: client.purge(kind, names))
        return labels

    async def export(self) -> AsyncGenerator[bytes, None]:
        yield export_format.header_line()
        # Keys of memory tiers, so that each entry is exported once; a disk may have many more.
        exported: set[str] = set()
        entries = 0
        exports = [client.export() for client in self._clients()] if self._has_memory else []
        for number, lines in enumerate((*exports, self._local.export())):
            async for line in lines:
                # Neither the first line nor the last has a key.
                key = orjson.loads(line).get("key")
                if key is not None and key not in exported:
                    entries += 1
                    if number < len(exports):
                        exported.add(key)
                    yield line
        yield export_format.footer_line(entries)

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        if self._tells_workers:
            problem = "Entries can't be imported where workers have only a memory tier each"
            raise AdminError(409, f"{problem}; tiers.disk or tiers.shared would hold them.")
        return await self._local.import_(lines)

    async def compact(self) -> dict[str, Any]:
        return await self._local.compact()

    async def verify(self) -> dict[str, Any]:
        return await self._local.verify()

    async def _page_of_memory(self, query: EntryQuery) -> tuple[list[dict[str, Any]], str | None]:
        """Return the next rows of all memory tiers, and the `after` of the next page."""
        asked = query._replace(tier=_MEMORY)
        pages = await self._ask(lambda client: client.page(asked))
        # Behind the end of an unfinished page its worker may have more.
        ends = [_place_of(page["after"]) for page in pages if page["after"] is not None]
        by_key: dict[str, dict[str, Any]] = {}
        for row in sorted((row for page in pages for row in page["entries"]), key=_place):
            if not ends or _place(row) <= min(ends):
                row["tiers"] += self._local.tiers_with(row["key"])
                by_key.setdefault(row["key"], row)
        rows = [*by_key.values()]
        if len(rows) > query.limit:
            rows = rows[: query.limit]
            ends = [_place(rows[-1])]
        if not ends:
            return rows, None
        frequency, key = min(ends)
        return rows, f"{_MEMORY}:{-frequency}:{key}"

    async def _held(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that a worker has in memory."""
        if not self._has_memory or not keys:
            return set()
        answers = await asyncio.gather(
            *(worker.call("POST", "/holds", keys) for worker in self._workers),
            return_exceptions=True,
        )
        held: set[str] = set()
        for answer in answers:
            if isinstance(answer, bytes):
                held |= {
                    key for key, is_held in zip(keys, orjson.loads(answer), strict=True) if is_held
                }
            elif not isinstance(answer, LinkError):
                raise answer
        return held

    async def _ask(self, ask: Callable[[AdminClient], Awaitable[_Answer]]) -> list[_Answer]:
        """Return the answers of all workers, but of those that die meanwhile.

        Raises:
            AdminError: one doesn't answer in time, or refuses.
        """
        answers = await asyncio.gather(*(self._ask_one(each, ask) for each in self._workers))
        return [each for answer in answers for each in answer]

    async def _ask_one(
        self, worker: WorkerProcess, ask: Callable[[AdminClient], Awaitable[_Answer]]
    ) -> list[_Answer]:
        # One that dies has nothing in memory any more, and no request under way.
        if (link := worker.link) is None:
            return []
        try:
            return [await _in_time(ask(self._client(link)))]
        except AdminError:
            if worker.link is not link:
                return []
            raise

    def _clients(self) -> list[AdminClient]:
        return [self._client(each.link) for each in self._workers if each.link is not None]

    def _client(self, link: Link) -> AdminClient:
        return AdminClient(link.session, self._max_line_bytes)


async def _in_time(answer: Awaitable[_Answer]) -> _Answer:
    try:
        async with asyncio.timeout(CALL_S):
            return await answer
    except TimeoutError as exc:
        raise AdminError(503, "A worker does not answer in time; try again.") from exc


async def _entry_if_any(key: str, operations: AdminOperations) -> dict[str, Any] | None:
    try:
        return await operations.entry(key)
    except AdminError as exc:
        if exc.status == 404:
            return None
        raise


def _place(row: dict[str, Any]) -> _Place:
    return -row["frequency"], row["key"]


def _place_of(after: str) -> _Place:
    """Return the place at which a worker's page of memory ended."""
    _, frequency, key = after.split(":", 2)
    return -int(frequency), key
