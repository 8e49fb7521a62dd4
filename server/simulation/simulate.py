"""The simulation: replays a trace against the chain that a configuration describes.

The chain is the server's own, with a real disk tier in a temporary folder. Only time is virtual:
the clock shows each request's time. A request is a lookup and, unless it is a hit, a store;
demotions complete before the next request. Not simulated is what no trace has: how long an answer
takes, how well it compresses, and requests that arrive while an equal one is being answered.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol, TypeVar

import uvloop
from pydantic import ByteSize, TypeAdapter, ValidationError

from server import terminal
from server.cache import build
from server.config.base import ConfigError
from server.config.schema import Config, DiskTierConfig, MemoryTierConfig
from server.protocol.cache_control import FreshnessRules
from server.protocol.formats import Encoding
from server.simulation.traces import Trace
from tiers import (
    Answer,
    BackgroundWork,
    Chain,
    DiskCache,
    Entry,
    MemoryCache,
    State,
    Tier,
    digest,
)  # fmt: skip
from tiers.disk import MIN_BYTES, Durability
from tiers.key import is_key

NONE = "none"
"""The limit of a tier that is left out."""

# Traces have no routes, so answers have the lifetime of this one's.
_ROUTE = "/v1/chat/completions"

_Request = TypeVar("_Request")


class ShowProgress(Protocol):
    """Yields the requests it is given, and shows progress under a name."""

    def __call__(self, requests: Sequence[_Request], name: str, /) -> Iterable[_Request]: ...


Warn = Callable[[str], None]
"""Tells the user what was changed in the options."""


def no_progress(requests: Sequence[_Request], _name: str, /) -> Iterable[_Request]:
    """Show no progress."""
    return requests


@dataclass(frozen=True, slots=True)
class TierResult:
    """The counters of a tier. Ratios are of the requests that reached it."""

    name: str
    max_bytes: int
    requests: int
    hits: int
    hit_ratio: float
    byte_hit_ratio: float
    stores: int
    """Of new answers, by promotion and by demotion."""
    promotions: int
    demotions: int
    evictions: int
    expirations: int
    entries: int
    """At the end."""


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The counters of a chain. Ratios are of all requests."""

    hits: int
    hit_ratio: float
    byte_hit_ratio: float
    disk_writes_per_request: float
    dropped_demotions: int
    tokens: int
    """Generated tokens of all requests; 0 if the trace has none."""
    tokens_saved: int
    """Generated tokens of the requests that tiers answered."""
    tiers: list[TierResult]


class Replay(NamedTuple):
    """The result of a replay, and the tier that answered each request."""

    result: ChainResult
    answered_by: bytearray
    """The tier's position in the chain, or the number of tiers for a miss."""


def with_limits(
    config: Config,
    trace: Trace,
    memory: str | None,
    disk: str | None,
    warn: Warn = lambda _: None,
) -> Config:
    """Return the configuration with other limits of its tiers.

    A limit is a size such as `64MiB`, a share of the trace's footprint such as `10%`, or `none`,
    which leaves the tier out. A share below the smallest limit of its tier is raised to that, and
    `warn` gets a message.

    Raises:
        ConfigError: a limit is none of these or too small, or no tier is left.
    """
    tiers, whole = config.tiers, (trace.name, trace.footprint_bytes)
    if memory is not None:
        max_bytes = parse_limit("--memory", memory, whole, 1, warn)
        tier = tiers.memory or MemoryTierConfig()
        held = None if max_bytes is None else tier.model_copy(update={"max_bytes": max_bytes})
        tiers = tiers.model_copy(update={"memory": held})
    if disk is not None:
        max_bytes = parse_limit("--disk", disk, whole, MIN_BYTES, warn)
        on_disk = tiers.disk or DiskTierConfig()
        kept = None if max_bytes is None else on_disk.model_copy(update={"max_bytes": max_bytes})
        tiers = tiers.model_copy(update={"disk": kept})
    if tiers.memory is None and tiers.disk is None:
        raise ConfigError(["tiers: should be at least one, memory or disk"])
    return config.model_copy(update={"tiers": tiers})


def simulate(config: Config, trace: Trace, progress: ShowProgress = no_progress) -> Replay:
    """Replay a trace against an empty chain.

    Raises:
        ConfigError: the temporary folder can't be used.
    """
    with TemporaryDirectory(prefix="tierserve-simulate-") as folder:
        return uvloop.run(_simulate(_in(Path(folder), config), trace, progress))


def memory_overhead_bytes(policy: str) -> int:
    """Return the size of an entry in memory, without its answer."""
    header_bytes = len(Entry(Answer(Encoding.JSON, b""), 0, 0).encode())
    return header_bytes + MemoryCache(1, policy=policy).overhead_bytes


def parse_limit(
    option: str, text: str, whole: tuple[str, int], least: int, warn: Warn
) -> int | None:
    """Return a limit in bytes; `None` if its tier is left out.

    Args:
        option: that has the limit.
        text: a size, a share, or `none`.
        whole: of what it may be a share, and its bytes.
        least: the smallest limit; a smaller share is raised to it.
        warn: is told so.

    Raises:
        ConfigError: it is none of these, or too small.
    """
    if text == NONE:
        return None
    is_share = text.endswith("%")
    try:
        if is_share:
            max_bytes = int(float(text[:-1]) / 100 * whole[1])
        else:
            max_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValueError, OverflowError, ValidationError):
        raise ConfigError([f"{option}: should be as 64MiB, 10%, or {NONE}, not {text!r}"]) from None
    if max_bytes >= least:
        return max_bytes
    if not is_share or max_bytes <= 0:
        raise ConfigError(
            [f"{option}: should be at least {terminal.human_size(least)}, not {text}"]
        )
    # A share may be too small for a small trace although it suits others.
    share = f"{text} of {whole[0]} is {terminal.human_size(max_bytes)}"
    warn(f"{option}: {share}; raised to the smallest limit, {terminal.human_size(least)}")
    return least


def _in(folder: Path, config: Config) -> Config:
    """Return the configuration with its disk tier in `folder`, and without fsync or compression.

    A shared tier is left out, since a trace has no entries of other servers.
    """
    tiers = config.tiers.model_copy(update={"shared": None})
    if (disk := tiers.disk) is not None:
        # The stored answers are zeros, which compress too well.
        changes = {"path": folder / "disk", "durability": Durability.OS, "compression": "none"}
        tiers = tiers.model_copy(update={"disk": disk.model_copy(update=changes)})
    return config.model_copy(update={"tiers": tiers})


async def _simulate(config: Config, trace: Trace, progress: ShowProgress) -> Replay:
    now = trace.start_s
    chain, background = build(config, clock=lambda: now, chance=Random(0).random)  # noqa: S311
    freshness = FreshnessRules(config.cache).of(_ROUTE, next(iter(config.models)))
    position = {tier.name: number for number, tier in enumerate(chain.tiers)}
    answered_by = bytearray()
    tokens_saved = 0
    try:
        for key, size, at_s, tokens in progress(trace.requests, trace.name):
            # Virtual time never runs backwards.
            now = max(now, at_s)
            # Keys of our own traces are used as they are, since they hold the tenant's scope.
            name = key if is_key(key) else digest(key.encode())
            hit = await chain.lookup(name)
            if hit is not None and hit.state in (State.FRESH, State.STALE_WHILE_REVALIDATE):
                answered_by.append(position[hit.tier])
                renews = hit.refresh
            else:
                answered_by.append(len(position))
                renews = True
            if renews:
                await chain.store(name, Answer(Encoding.JSON, bytes(size)), freshness)
            else:
                tokens_saved += tokens
            await background.drain()
        return Replay(_result(chain, background, trace, answered_by, tokens_saved), answered_by)
    finally:
        await chain.close()


def _result(
    chain: Chain,
    background: BackgroundWork,
    trace: Trace,
    answered_by: bytearray,
    tokens_saved: int,
) -> ChainResult:
    requests, all_bytes = len(answered_by), sum(request.size for request in trace.requests)
    hits = [0] * (len(chain.tiers) + 1)
    hit_bytes = hits.copy()
    for position, request in zip(answered_by, trace.requests, strict=True):
        hits[position] += 1
        hit_bytes[position] += request.size
    tiers = []
    left, left_bytes = requests, all_bytes
    for tier, tier_hits, tier_hit_bytes in zip(chain.tiers, hits, hit_bytes, strict=False):
        tiers.append(_tier_result(tier, left, tier_hits, tier_hit_bytes, left_bytes))
        left -= tier_hits
        left_bytes -= tier_hit_bytes
    disk_writes = sum(tier.stores for tier in tiers if tier.name == DiskCache.NAME)
    return ChainResult(
        hits=requests - left,
        hit_ratio=ratio(requests - left, requests),
        byte_hit_ratio=ratio(all_bytes - left_bytes, all_bytes),
        disk_writes_per_request=ratio(disk_writes, requests),
        dropped_demotions=background.dropped,
        tokens=sum(request.tokens for request in trace.requests),
        tokens_saved=tokens_saved,
        tiers=tiers,
    )


def _tier_result(tier: Tier, asked: int, hits: int, hit_bytes: int, asked_bytes: int) -> TierResult:
    backend, counts = tier.local, tier.counts
    if backend is None:
        raise TypeError("only memory and disk are simulated")
    return TierResult(
        name=tier.name,
        max_bytes=backend.max_bytes,
        requests=asked,
        hits=hits,
        hit_ratio=ratio(hits, asked),
        byte_hit_ratio=ratio(hit_bytes, asked_bytes),
        stores=counts.stores,
        promotions=counts.promotions,
        demotions=counts.demotions,
        evictions=backend.usage.evictions,
        expirations=backend.usage.expirations,
        entries=backend.usage.entries,
    )


def ratio(part: int, whole: int) -> float:
    """Return `part / whole`, or 0 if `whole` is 0."""
    return part / whole if whole else 0.0
