"""The report of a simulated trace, as tables or JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from server.config.schema import Config
from server.simulation import references
from server.simulation.prefix_report import (
    PrefixRecommendation,
    PrefixReplay,
    PrefixReuse,
    PromptOptions,
    replay_prefixes,
)
from server.simulation.recommend import SizeRecommendation, recommend
from server.simulation.references import ReferenceResult
from server.simulation.simulate import (
    ChainResult,
    Replay,
    ShowProgress,
    Warn,
    memory_overhead_bytes,
    ratio,
    simulate,
)
from server.simulation.traces import Trace
from server.terminal import human_size, table


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """A trace in numbers, and the results of its replays."""

    trace: str
    requests: int
    keys: int
    footprint_bytes: int
    """The size of all different keys together."""
    span_s: float
    """From the first request to the last; 0 if the trace has no times."""
    chain: ChainResult
    references: list[ReferenceResult]
    """Of caches as large as the memory tier."""
    prefixes: PrefixReuse | None
    """Reuse of prompts' blocks, if the trace has any."""
    recommendation: SizeRecommendation | None


class Simulation(NamedTuple):
    """A report, and the replays it is made of."""

    report: SimulationReport
    replay: Replay
    prefixes: PrefixReplay | None


def build_report(
    config: Config,
    trace: Trace,
    progress: ShowProgress,
    *,
    recommends: bool,
    options: PromptOptions | None = None,
    warn: Warn = lambda _: None,
) -> Simulation:
    """Replay a trace against the chain, reference policies, and caches of prefix blocks.

    Raises:
        ConfigError: the temporary folder can't be used, or an option is wrong.
    """
    replay = simulate(config, trace, progress)
    options = options or PromptOptions()
    prefixes = replay_prefixes(
        config, trace, replay, options, progress, recommends=recommends, warn=warn
    )
    times = [request.at_s for request in trace.requests]
    has_keys = bool(trace.requests)
    report = SimulationReport(
        trace=trace.name,
        requests=len(trace.requests),
        keys=len(trace.sizes),
        footprint_bytes=trace.footprint_bytes,
        span_s=max(times) - times[0] if has_keys else 0.0,
        chain=replay.result,
        references=_references(config, trace) if has_keys else [],
        prefixes=None if prefixes is None else prefixes.report,
        recommendation=recommend(config, trace, progress) if recommends and has_keys else None,
    )
    return Simulation(report, replay, prefixes)


def _references(config: Config, trace: Trace) -> list[ReferenceResult]:
    if (memory := config.tiers.memory) is None or not references.is_installed():
        return []
    overhead_bytes = memory_overhead_bytes(memory.policy)
    return [
        references.compare(trace, policy, memory.max_bytes, overhead_bytes)
        for policy in (*references.ONLINE, references.OPTIMUM)
    ]


def list_omissions(config: Config) -> list[str]:
    """Return what the reports leave out, and why."""
    missing = []
    if config.tiers.memory is None:
        missing.append(
            "no reference policies: they stand in for the memory tier, and there is none"
        )
    elif not references.is_installed():
        missing.append(
            "no reference policies: libcachesim isn't installed: install tierserve[simulate]"
        )
    if config.tiers.disk is not None and config.tiers.disk.compression != "none":
        missing.append("no compression on disk: a trace has no answers to compress")
    if config.tiers.shared is not None:
        missing.append("no shared tier: a trace has no entries of other servers")
    return missing


def as_json(reports: Sequence[SimulationReport], missing: Sequence[str]) -> str:
    """Return everything as one JSON object."""
    everything = {"traces": list(reports), "notes": list(missing)}
    return orjson.dumps(everything, option=orjson.OPT_INDENT_2).decode()


def as_text(report: SimulationReport) -> str:
    """Return a report as tables."""
    parts = [
        [
            f"{report.trace}: {report.requests:,} requests for {report.keys:,} keys of "
            f"{human_size(report.footprint_bytes)} together"
            + (f", in {report.span_s:,.0f} s" * bool(report.span_s))
        ],
        _of_chain(report),
    ]
    if report.references:
        parts.append(_of_references(report.references))
    if report.recommendation is not None:
        parts.append(_of_recommendation(report.recommendation))
    if (prefixes := report.prefixes) is not None:
        parts.append(_of_prefixes(prefixes))
        if prefixes.recommendation is not None:
            parts.append(_of_prefix_sizes(prefixes, prefixes.recommendation))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _of_chain(report: SimulationReport) -> list[str]:
    chain = report.chain
    head = (
        "tier", "limit", "requests", "hits", "hit ratio", "byte hits",
        "stores", "promotions", "demotions", "evictions", "expired",
    )  # fmt: skip
    rows = [
        (
            tier.name, human_size(tier.max_bytes), f"{tier.requests:,}", f"{tier.hits:,}",
            f"{tier.hit_ratio:.2%}", f"{tier.byte_hit_ratio:.2%}", f"{tier.stores:,}",
            f"{tier.promotions:,}", f"{tier.demotions:,}", f"{tier.evictions:,}",
            f"{tier.expirations:,}",
        )
        for tier in chain.tiers
    ]  # fmt: skip
    ratios = (f"{chain.hit_ratio:.2%}", f"{chain.byte_hit_ratio:.2%}")
    rows.append(("all", "", f"{report.requests:,}", f"{chain.hits:,}", *ratios, "", "", "", "", ""))
    lines = table(head, rows)
    lines.append(f"disk writes per request: {chain.disk_writes_per_request:.3f}")
    if chain.dropped_demotions:
        lines.append(f"demotions dropped: {chain.dropped_demotions:,}")
    if chain.tokens:
        saved = ratio(chain.tokens_saved, chain.tokens)
        lines.append(
            f"output tokens saved: {chain.tokens_saved:,} of {chain.tokens:,} ({saved:.2%})"
        )
    return lines


def _of_references(compared: Sequence[ReferenceResult]) -> list[str]:
    rows = [
        (each.policy, f"{each.hits:,}", f"{each.hit_ratio:.2%}", f"{each.byte_hit_ratio:.2%}")
        for each in compared
    ]
    title = "libcachesim's policies in the memory tier's place (Belady knows the future)"
    return [title, *table(("policy", "hits", "hit ratio", "byte hits"), rows)]


def _of_prefixes(found: PrefixReuse) -> list[str]:
    model = found.model
    lines = [
        f"prefix blocks of {found.requests:,} requests to the engine: {found.tokens:,} tokens, "
        f"{found.blocks:,} different blocks of {found.block_tokens:,} tokens",
        f"in the engine's cache of {found.engine_tokens:,} tokens: {found.engine_reused:,} tokens "
        f"({found.engine_ratio:.2%})",
    ]
    if found.max_bytes is None:
        return [*lines, "there is no prefix tier; --prefix SIZE gives one"]
    head = ("policy", "loads", "tokens loaded", "ratio", "with engine", "s saved", "written")
    rows = [
        (
            each.policy, f"{each.loads:,}", f"{each.tokens:,}", f"{each.ratio:.2%}",
            f"{each.reuse_ratio:.2%}", f"{each.saved_s:,.0f}",
            "" if each.stored_bytes is None else human_size(each.stored_bytes),
        )
        for each in found.rows
    ]  # fmt: skip
    return [
        *lines,
        f"below it, on disk, {human_size(found.max_bytes)} at {model.bytes_per_token:,} bytes per "
        f"token, computing {model.compute_tokens_per_s:,.0f} and loading "
        f"{model.load_tokens_per_s:,.0f} tokens per second",
        *table(head, rows),
    ]


def _of_prefix_sizes(report: PrefixReuse, found: PrefixRecommendation) -> list[str]:
    rows = [
        (
            human_size(point.max_bytes), f"{point.tokens:,}", f"{point.ratio:.2%}",
            f"{point.saved_s:,.0f}", f"{ratio(point.optimum_tokens, report.tokens):.2%}",
        )
        for point in found.curve
    ]  # fmt: skip
    return [
        "the prefix tier by size",
        *table(("limit", "tokens loaded", "ratio", "s saved", "optimum"), rows),
        f"recommended: {human_size(found.max_bytes)}; beyond it, another "
        f"{human_size(found.step_bytes)} add less than 1% to the tokens loaded",
    ]


def _of_recommendation(found: SizeRecommendation) -> list[str]:
    rows = [
        (human_size(point.max_bytes), f"{point.hits:,}", f"{point.hit_ratio:.2%}")
        for point in found.curve
    ]
    return [
        "the memory tier alone",
        *table(("limit", "hits", "hit ratio"), rows),
        f"recommended: {human_size(found.max_bytes)}; beyond it, another "
        f"{human_size(found.step_bytes)} add less than 1% to the hits",
    ]
