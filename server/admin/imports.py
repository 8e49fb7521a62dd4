"""Storing what was exported."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from server.admin import export_format
from server.admin.operations import AdminError
from server.admin.time_slice import TimeSlice
from tiers import Chain, DiskCache, ImportResult, MemoryCache, State

# Stored at once, as the disk tier commits together what comes together.
_BATCH, _BATCH_BYTES = 64, 8 * 1024**2
# Of a disk tier that reports before it has written.
_QUEUED_BYTES = 16 * 1024**2
_DRAIN_S = 0.01
_NAMED = 100


class ImportJob:
    """One import into a chain.

    It goes to all tiers but memory: what may never be asked for mustn't push out what is.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        far = [tier for tier in chain.tiers if not isinstance(tier.backend, MemoryCache)]
        self._into = far or chain.tiers
        self._disks = [t.backend for t in chain.tiers if isinstance(t.backend, DiskCache)]
        self._counts = dict.fromkeys(
            ("stored", "unchanged", "older", "expired", "purged", "refused", "damaged"), 0
        )
        self._problems: list[str] = []
        self._batch: list[export_format.ExportedEntry] = []
        self._batch_bytes = self._entries = 0
        self._declared: int | None = None

    async def run(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        """Store what `lines` hold, and return as `AdminOperations.import_` describes it.

        Raises:
            AdminError: they aren't an export.
        """
        try:
            export_format.check_header(await anext(lines, b""))
        except ValueError as exc:
            raise AdminError(400, f"The import {exc}.") from exc
        number, pace = 1, TimeSlice()
        async for line in lines:
            number += 1
            await self._read(number, line)
            if len(self._batch) >= _BATCH or self._batch_bytes > _BATCH_BYTES:
                await self._store()
            await pace.yield_if_over()
        await self._store()
        if self._declared is None:
            self._problems.append("the last line is missing: the export was cut")
        elif self._declared != self._entries:
            told = f"the last line tells of {self._declared} entries"
            self._problems.append(f"{told}, and {self._entries} could be read")
        return {**self._counts, "problems": self._problems}

    async def _read(self, number: int, line: bytes) -> None:
        try:
            found = await export_format.decode_line_offloaded(line)
        except ValueError as exc:
            self._counts["damaged"] += 1
            if len(self._problems) < _NAMED:
                self._problems.append(f"line {number} {exc}")
            return
        if isinstance(found, int):
            self._declared = found
            return
        self._entries += 1
        if found.entry.state(self._chain.clock()) is State.EXPIRED:
            self._counts["expired"] += 1
        else:
            self._batch.append(found)
            self._batch_bytes += len(line)

    async def _store(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        for adoption in await asyncio.gather(*map(self._adopt, batch)):
            self._counts[adoption] += 1
        for disk in self._disks:
            while disk.queued_bytes > _QUEUED_BYTES:  # noqa: ASYNC110 - commits take their time.
                await asyncio.sleep(_DRAIN_S)

    async def _adopt(self, found: export_format.ExportedEntry) -> ImportResult:
        return await self._chain.import_entry(*found, self._into)
