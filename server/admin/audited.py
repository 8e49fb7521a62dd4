"""The operations, recorded in the audit log: what changes entries, and what shows answers."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from server.admin.operations import AdminOperations, EntryQuery
from server.audit.actor import Actor
from server.audit.acts import Audit
from tiers.purges.table import ALL

# The first line of an export and the last have no entry.
_FRAME_LINES = 2


class AuditedOperations(AdminOperations):
    """The operations of somebody.

    All that are recorded raise `AuditError` where that is impossible. Sizes and lists aren't.

    Args:
        operations: are done.
        audit: records them.
        actor: who asks for them.
    """

    def __init__(self, operations: AdminOperations, audit: Audit, actor: Actor) -> None:
        self._operations, self._audit, self._actor = operations, audit, actor

    async def stats(self) -> dict[str, Any]:
        return await self._operations.stats()

    async def chains(self, limit: int, label: str = "") -> dict[str, Any]:
        return await self._operations.chains(limit, label)

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        return await self._operations.page(query)

    async def entry(self, key: str) -> dict[str, Any]:
        async with self._audit.act("show", self._actor, {"key": key}):
            return await self._operations.entry(key)

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        what = {kind: True if kind == ALL else names}
        async with self._audit.act("purge", self._actor, what) as act:
            labels = await self._operations.purge(kind, names)
            act.count = {"labels": len(labels)}
            return labels

    async def export(self) -> AsyncGenerator[bytes, None]:
        async with (
            self._audit.act("export", self._actor, {}) as act,
            aclosing(self._operations.export()) as lines,
        ):
            number = 0
            async for line in lines:
                number += 1
                act.count = {"entries": max(number - _FRAME_LINES, 0)}
                yield line

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        async with self._audit.act("import", self._actor, {}) as act:
            result = await self._operations.import_(lines)
            act.count = {name: count for name, count in result.items() if name != "problems"}
            return result

    async def compact(self) -> dict[str, Any]:
        async with self._audit.act("compact", self._actor, {}):
            return await self._operations.compact()

    async def verify(self) -> dict[str, Any]:
        return await self._operations.verify()
