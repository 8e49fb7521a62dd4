"""The report of a simulated trace, as tables or JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from server.config.schema import Config
from server.simulation import references
from server.simulation.prefix_report import PrefixReuse, measure
from server.simulation.recommend import SizeRecommendation, recommend
from server.simulation.references import ReferenceResult
from server.simulation.simulate import (
    ChainResult,
    Progress,
    Replay,
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
    prefixes: list[PrefixReuse]
    recommendation: SizeRecommendation | None


def build_report(
    config: Config, trace: Trace, progress: Progress, *, recommends: bool
) -> tuple[SimulationReport, Replay]:
    """Replay a trace against the chain, reference policies, and caches of prefix blocks.

    Raises:
        ConfigError: the temporary folder can't be used.
    """
    replay = simulate(config, trace, progress)
    compared: list[ReferenceResult] = []
    policies: tuple[str, ...] = ()
    if (memory := config.tiers.memory) is not None:
        policies = (memory.policy,)
        overhead_bytes = memory_overhead_bytes(memory.policy)
        if references.is_installed():
            compared = [
                references.compare(trace, policy, memory.max_bytes, overhead_bytes)
                for policy in (*references.ONLINE, references.OPTIMUM)
            ]
    times = [request.at_s for request in trace.requests]
    report = SimulationReport(
        trace=trace.name,
        requests=len(trace.requests),
        keys=len(trace.sizes),
        footprint_bytes=trace.footprint_bytes,
        span_s=max(times) - times[0],
        chain=replay.result,
        references=compared,
        prefixes=measure(trace, policies),
        recommendation=recommend(config, trace, progress) if recommends else None,
    )
    return report, replay


def list_omissions(config: Config) -> list[str]:
    """Return what the reports leave out, and why."""
    missing = []
    if config.tiers.memory is None:
        missing.append(
            "no reference policies: they stand in for the memory tier, and there is none"
        )
    elif not references.is_installed():
        missing.append(
            "no reference policies: libcachesim isn't installed; it is in the extra simulate"
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
    if report.prefixes:
        parts.append(_of_prefixes(report.prefixes))
    if report.recommendation is not None:
        parts.append(_of_recommendation(report.recommendation))
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


def _of_prefixes(prefixes: Sequence[PrefixReuse]) -> list[str]:
    rows = [
        (
            each.policy, f"{each.max_blocks:,}", f"{each.blocks:,}", f"{each.reused:,}",
            f"{each.reuse_ratio:.2%}", f"{each.tokens_saved:,}",
        )
        for each in prefixes
    ]  # fmt: skip
    head = ("policy", "cache", "blocks", "reused", "ratio", "prompt tokens saved")
    return ["prefix blocks, the leading run of each prompt", *table(head, rows)]


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
