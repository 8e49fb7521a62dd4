"""The operations in this process, on a running server's chain or on the disk tier's file."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from server.admin import export_format
from server.admin.imports import ImportJob
from server.admin.listing import EntryListing
from server.admin.operations import STOP_FIRST, AdminError, AdminOperations, EntryQuery
from server.admin.time_slice import TimeSlice
from server.auth.tenants import Tenants
from server.cache import build
from server.config.schema import Config
from server.prefix_tier.build import build_prefix_tier
from server.prefix_tier.tier import PrefixTier, PrefixTierError
from server.protocol import template
from server.protocol.formats import CHOICES
from server.protocol.labels import label_problem
from tiers import Chain, PurgeError, Purges, Tier
from tiers.disk import verify_in_use
from tiers.disk.file import DATA
from tiers.prefix_kv.chains import StoredChain
from tiers.prefix_kv.index.index_file import INDEX
from tiers.purges.table import ALL, MAX_LABELS, label

# Of a wrong name, in an error message.
_MAX_SHOWN = 64


class LocalOperations(AdminOperations):
    """The operations on a chain.

    Args:
        chain: the tiers' chain.
        tiers: the tiers to list, export and import into; by default the chain's.
        prefix_tier: the prefix tier, if there is one.
    """

    def __init__(
        self,
        chain: Chain,
        tiers: Sequence[Tier] | None = None,
        prefix_tier: PrefixTier | None = None,
    ) -> None:
        self._chain, self._prefix_tier = chain, prefix_tier
        self._tiers = chain.tiers if tiers is None else tuple(tiers)
        self._listing = EntryListing(chain, self._tiers)

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = {"tiers": [_statistics(tier) for tier in self._tiers]}
        if self._prefix_tier is not None:
            stats["prefix"] = self._prefix_tier.report.as_json()
        return stats

    async def chains(self, limit: int, label: str = "") -> dict[str, Any]:
        tier = self._prefix_tier
        if tier is None:
            raise AdminError(409, "There is no prefix tier.")
        try:
            found = await tier.chains(limit, label)
        except PrefixTierError as exc:
            raise AdminError(503, str(exc)) from exc
        now = self._chain.clock()
        return {"chains": [_row(chain, now) for chain in found]}

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        return await self._listing.page(query)

    def tiers_with(self, key: str) -> list[str]:
        """Return the names of the tiers that hold an entry."""
        return self._listing.tiers_with(key)

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
            if self._prefix_tier is not None:
                await self._prefix_tier.purge(labels)
        except ValueError as exc:
            raise AdminError(400, str(exc), param=kind) from exc
        except (PurgeError, PrefixTierError) as exc:
            raise AdminError(503, str(exc)) from exc
        return labels

    async def export(self) -> AsyncGenerator[bytes, None]:
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
        verified: dict[str, Any] = {}
        for backend in self._listing.open_backends():
            if backend.path is not None:
                verified = (await verify_in_use(backend.path))._asdict()
        if self._prefix_tier is not None:
            try:
                verified["prefix"] = await self._prefix_tier.verify()
            except PrefixTierError as exc:
                raise AdminError(503, str(exc)) from exc
        if not verified:
            raise AdminError(409, "There is neither a disk tier nor a prefix tier.")
        return verified


@asynccontextmanager
async def open_local(config: Config, *, with_disk: bool = True) -> AsyncIterator[LocalOperations]:
    """Open the files of the disk and the prefix tier, which a server may use at the same time.

    Without `with_disk`, the disk tier's file is neither opened nor made.

    Raises:
        ConfigError: its folder can't be used.
        OSError: it can't be opened.
        UntrustedError: it is damaged. Only a server quarantines it.
    """
    tiers_config = config.tiers if with_disk else config.tiers.model_copy(update={"disk": None})
    chain, background = build(config.model_copy(update={"tiers": tiers_config}), quarantines=False)
    try:
        for tier in chain.tiers:
            await tier.opened()
        await background.learn_purges()
        await background.load_sketch()
        # This process's memory tier is empty.
        tiers = [tier for tier in chain.tiers if not tier.in_memory]
        async with open_prefix_tier(config, chain.purges) as prefix_tier:
            yield LocalOperations(chain, tiers, prefix_tier)
    finally:
        await chain.close()


@asynccontextmanager
async def open_prefix_tier(config: Config, purges: Purges) -> AsyncIterator[PrefixTier | None]:
    """Open the prefix tier, if there is one that engines have used, and write it the purges."""
    tier = None
    if has_prefix_files(config):
        tier = build_prefix_tier(config, purges, Tenants(config.tenants))
    if tier is None:
        yield None
        return
    try:
        await tier.refresh()
        yield tier
    finally:
        await tier.close()


def has_disk_file(config: Config) -> bool:
    """Return whether a disk tier is configured, and its file is there."""
    disk = config.tiers.disk
    return disk is not None and disk.path is not None and (disk.path / DATA).exists()


def has_prefix_files(config: Config) -> bool:
    """Return whether a prefix tier is configured, and its files are there."""
    prefix = config.tiers.prefix
    return prefix is not None and prefix.path is not None and (prefix.path / INDEX).exists()


def _row(chain: StoredChain, now: float) -> dict[str, Any]:
    return {
        "key": chain.key,
        "blocks": chain.blocks,
        "tokens": chain.tokens,
        "bytes": chain.size,
        "labels": [*chain.labels],
        "priority": chain.priority,
        "ttl_s": round(chain.expires_at - now, 3),
    }


def _statistics(tier: Tier) -> dict[str, Any]:
    statistics: dict[str, Any] = {"tier": tier.name, **asdict(tier.counts)}
    if (backend := tier.local) is not None:
        statistics |= asdict(backend.usage) | {"max_bytes": backend.max_bytes}
        if (file := backend.statistics()) is not None:
            statistics["file"] = asdict(file)
    return statistics
