"""The operations in this process, on a running server's chain or on the disk tier's file."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from server.admin import export_format
from server.admin.imports import ImportJob
from server.admin.listing import EntryListing
from server.admin.operations import STOP_FIRST, AdminError, AdminOperations, EntryQuery
from server.admin.time_slice import TimeSlice
from server.cache import build
from server.config.schema import Config
from server.protocol import template
from server.protocol.formats import CHOICES
from server.protocol.labels import label_problem
from tiers import Chain, PurgeError, Tier
from tiers.disk import verify_in_use
from tiers.purges.table import ALL, MAX_LABELS, label

# Of a wrong name, in an error message.
_MAX_SHOWN = 64


class LocalOperations(AdminOperations):
    """The operations on a chain.

    Args:
        chain: the tiers' chain.
        tiers: the tiers to list, export and import into; by default the chain's.
    """

    def __init__(self, chain: Chain, tiers: Sequence[Tier] | None = None) -> None:
        self._chain = chain
        self._tiers = chain.tiers if tiers is None else tuple(tiers)
        self._listing = EntryListing(chain, self._tiers)

    async def stats(self) -> dict[str, Any]:
        return {"tiers": [_statistics(tier) for tier in self._tiers]}

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        return await self._listing.page(query)

    async def entry(self, key: str) -> dict[str, Any]:
        entry = await self._chain.peek(key)
        if entry is None:
            raise AdminError(404, "There is no entry under this key.", param="key")
        # Streams of typed events have no `[DONE]`.
        done = b"" if entry.answer.content.startswith(b"event:") else CHOICES.done
        content = template.render(entry.answer, b"", 0, wants_usage=False, done=done)
        return self._listing.describe(key, entry) | {
            "stored_at": entry.stored_at,
            "expires_at": entry.expires_at,
            "kept_until": entry.kept_until,
            "took_s": entry.generation_s,
            "form": export_format.ENCODING_NAMES[entry.answer.encoding],
            "content": content.decode(errors="replace"),
        }

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        if kind != ALL and not 0 < len(names) <= MAX_LABELS:
            problem = f"{kind} should have from 1 to {MAX_LABELS} names at once, not {len(names)}"
            raise AdminError(400, f"{problem}; nothing was purged.", param=kind)
        for name in names:
            if (should := label_problem(kind, name)) is not None:
                problem = (
                    f"{kind} should be {should}, not {name[:_MAX_SHOWN]!r}; nothing was purged."
                )
                raise AdminError(400, problem, param=kind)
        labels = [ALL] if kind == ALL else [label(kind, name) for name in names]
        try:
            await self._chain.purge(*labels)
        except ValueError as exc:
            raise AdminError(400, str(exc), param=kind) from exc
        except PurgeError as exc:
            raise AdminError(503, str(exc)) from exc
        return labels

    async def export(self) -> AsyncIterator[bytes]:
        backends, time_slice = self._listing.open_backends(), TimeSlice()
        # Keys of nearer tiers, so that each entry is exported once.
        exported: set[str] = set()
        entries = 0
        yield export_format.header_line()
        for number, backend in enumerate(backends, 1):
            keys = backend.keys_after() if backend.is_ordered else backend.keys()
            for key in keys:
                if key not in exported and (entry := self._listing.peek(backend, key)) is not None:
                    entries += 1
                    if number < len(backends):
                        exported.add(key)
                    yield await export_format.encode_entry_offloaded(key, entry)
                await time_slice.yield_if_over()
        yield export_format.footer_line(entries)

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        # A disk tier that is still opening would drop the entries.
        self._listing.open_backends()
        return await ImportJob(self._chain).run(lines)

    async def compact(self) -> dict[str, Any]:
        raise AdminError(409, STOP_FIRST)

    async def verify(self) -> dict[str, Any]:
        for backend in self._listing.open_backends():
            if backend.path is not None:
                return (await verify_in_use(backend.path))._asdict()
        raise AdminError(409, "There is no disk tier.")


@asynccontextmanager
async def open_local(config: Config) -> AsyncIterator[LocalOperations]:
    """Open the disk tier's file, which a server may use at the same time.

    Raises:
        ConfigError: its folder can't be used.
        OSError: it can't be opened.
        UntrustedError: it is damaged. Only a server quarantines it.
    """
    chain, background = build(config, quarantines=False)
    try:
        for tier in chain.tiers:
            await tier.opened()
        await background.load_sketch()
        # This process's memory tier is empty.
        tiers = [tier for tier in chain.tiers if not tier.in_memory]
        yield LocalOperations(chain, tiers)
    finally:
        await chain.close()


def _statistics(tier: Tier) -> dict[str, Any]:
    statistics: dict[str, Any] = {"tier": tier.name, **asdict(tier.counts)}
    if (backend := tier.local) is not None:
        statistics |= asdict(backend.usage) | {"max_bytes": backend.max_bytes}
        if (file := backend.statistics()) is not None:
            statistics["file"] = asdict(file)
    return statistics
