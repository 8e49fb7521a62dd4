"""Imports: storing the entries of an export in the tiers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from server.admin import export_format
from server.admin.operations import AdminError
from server.admin.time_slice import TimeSlice
from tiers import Chain, ImportResult, State

# Stored concurrently, so that the disk tier commits them together.
_BATCH, _BATCH_BYTES = 64, 8 * 1024**2
# A disk tier whose queue is longer is waited for; it may confirm writes before they are done.
_MAX_QUEUED_BYTES = 16 * 1024**2
_DRAIN_S = 0.01
_MAX_PROBLEMS = 100


class ImportJob:
    """One import into a chain.

    Entries go to all tiers but memory, since they may never be requested and would evict others.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        far = [tier for tier in chain.tiers if not tier.in_memory]
        self._into = far or chain.tiers
        self._backends = [tier.local for tier in chain.tiers if tier.local is not None]
        self._counts = dict.fromkeys(
            ("stored", "unchanged", "older", "expired", "purged", "refused", "damaged"), 0
        )
        self._problems: list[str] = []
        self._batch: list[export_format.ExportedEntry] = []
        self._batch_bytes = self._entries = 0
        self._declared: int | None = None

    async def run(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        """Store the entries of an export, as `AdminOperations.import_` describes it.

        Raises:
            AdminError: the lines aren't an export.
        """
        try:
            export_format.check_header(await anext(lines, b""))
        except ValueError as exc:
            raise AdminError(400, f"The import {exc}.") from exc
        number, time_slice = 1, TimeSlice()
        async for line in lines:
            number += 1
            await self._read(number, line)
            if len(self._batch) >= _BATCH or self._batch_bytes > _BATCH_BYTES:
                await self._store()
            await time_slice.yield_if_over()
        await self._store()
        if self._declared is None:
            self._problems.append("the last line is missing: the export was cut")
        elif self._declared != self._entries:
            declared = f"the last line counts {self._declared} entries"
            self._problems.append(f"{declared}, but {self._entries} could be read")
        return {**self._counts, "problems": self._problems}

    async def _read(self, number: int, line: bytes) -> None:
        try:
            found = await export_format.decode_line_offloaded(line)
        except ValueError as exc:
            self._counts["damaged"] += 1
            if len(self._problems) < _MAX_PROBLEMS:
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
        for result in await asyncio.gather(*map(self._import_entry, batch)):
            self._counts[result] += 1
        for each in self._backends:
            while each.queued_bytes > _MAX_QUEUED_BYTES:  # noqa: ASYNC110 - commits take a while.
                await asyncio.sleep(_DRAIN_S)

    async def _import_entry(self, found: export_format.ExportedEntry) -> ImportResult:
        return await self._chain.import_entry(*found, self._into)
