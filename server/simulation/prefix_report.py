"""The reuse of prompts' blocks: in an engine's own cache, and from the prefix tier below it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.config.base import ConfigError
from server.config.prefix_tier import PrefixTierConfig
from server.config.schema import Config
from server.simulation.engine_cache import EngineCache, engine_prompts, taken_blocks
from server.simulation.prefix_baselines import replay_lru, replay_optimum
from server.simulation.prefix_tier import EngineRequest, PrefixModel, TierRun, replay_tier
from server.simulation.recommend import enough_bytes
from server.simulation.simulate import Replay, ShowProgress, Warn, parse_limit, ratio
from server.simulation.traces import Trace, TracePrompt
from tiers.prefix_kv.store import MIN_BYTES

OURS, LRU, OPTIMUM = "prefix tier", "LRU, stores all", "optimum"
_HALVINGS = 10
_STEP_SHARE = 0.1
_INDEX_SHARE, _INDEX_BYTES = 63 / 64, 8 * 1024**2
"""What the tier's index leaves to blocks, and takes at least."""


class PromptOptions(NamedTuple):
    """What a trace doesn't have. The rates and the size are the embedded model's on two cores."""

    engine_tokens: str = "10%"
    """Tokens that an engine's cache holds, or a share of the different tokens of the trace."""
    limit: str | None = None
    """Of the prefix tier, instead of the configured one."""
    bytes_per_token: int = 46_080
    compute_tokens_per_s: float = 230
    load_tokens_per_s: float = 100_000


@dataclass(frozen=True, slots=True)
class PrefixRow:
    """What a policy would load, below an engine's cache, in a tier of the same size."""

    policy: str
    loads: int
    """Requests of which a part is loaded."""
    tokens: int
    """Tokens that are loaded and needn't be computed."""
    ratio: float
    """Of all tokens of prompts."""
    reuse_ratio: float
    """Of all tokens of prompts, together with those that the engine's cache has."""
    saved_s: float
    """Seconds that computing them would take longer than loading them."""
    stored_bytes: int | None
    """Written to disk; `None` for the optimum."""


@dataclass(frozen=True, slots=True)
class PrefixPoint:
    """What the prefix tier would load at a size."""

    max_bytes: int
    tokens: int
    ratio: float
    saved_s: float
    optimum_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixRecommendation:
    """The size from which on another `step_bytes` add less than 1% to the tokens."""

    max_bytes: int
    step_bytes: int
    curve: list[PrefixPoint]
    """Up to the size of all different blocks."""


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """Reuse of prompts' blocks."""

    requests: int
    """Those that no other tier answers."""
    tokens: int
    """Of their prompts."""
    block_tokens: int
    blocks: int
    """Different ones."""
    model: PrefixModel
    engine_tokens: int
    """That the engine's cache holds."""
    engine_reused: int
    """Tokens found there."""
    engine_ratio: float
    max_bytes: int | None
    """Of the prefix tier; `None` if there is none."""
    rows: list[PrefixRow]
    recommendation: PrefixRecommendation | None


class PrefixReplay(NamedTuple):
    """A report, and what it is made of."""

    report: PrefixReuse
    requests: list[EngineRequest]
    loaded: list[int]
    """Blocks that the prefix tier loads, for each request; empty without the tier."""


def replay_prefixes(
    config: Config,
    trace: Trace,
    replay: Replay,
    options: PromptOptions,
    progress: ShowProgress,
    *,
    recommends: bool,
    warn: Warn = lambda _: None,
) -> PrefixReplay | None:
    """Replay the prompts that no tier has answered in `replay`; `None` if the trace has none.

    Raises:
        ConfigError: an option is wrong.
    """
    prompts = list(engine_prompts(trace, replay.answered_by, len(replay.result.tiers)))
    if not prompts:
        return None
    model = _model(config, trace.block_tokens, options)
    blocks = len({block for prompt in prompts for block in prompt.blocks})
    engine_blocks = _engine_blocks(options.engine_tokens, trace, prompts, blocks, warn)
    cache = EngineCache(engine_blocks, model.block_tokens)
    requests = [(prompt, cache.ask(prompt)) for prompt in prompts]
    comparison = _Comparison(requests, model, progress)
    max_bytes = _limit(config, options, (trace.name, blocks * model.block_bytes), warn)
    rows, loaded = ([], []) if max_bytes is None else comparison.rows(max_bytes)
    report = PrefixReuse(
        requests=len(prompts),
        tokens=comparison.tokens,
        block_tokens=model.block_tokens,
        blocks=blocks,
        model=model,
        engine_tokens=engine_blocks * model.block_tokens,
        engine_reused=comparison.reused,
        engine_ratio=ratio(comparison.reused, comparison.tokens),
        max_bytes=max_bytes,
        rows=rows,
        recommendation=comparison.recommend(blocks) if recommends and blocks else None,
    )
    return PrefixReplay(report, requests, loaded)


class _Comparison:
    """Policies in the place of the prefix tier, for the requests of an engine."""

    def __init__(
        self, requests: Sequence[EngineRequest], model: PrefixModel, progress: ShowProgress
    ) -> None:
        self._requests, self._model, self._progress = requests, model, progress
        self.tokens = sum(prompt.tokens for prompt, _ in requests)
        self.reused = sum(computed for _, computed in requests) * model.block_tokens

    def rows(self, max_bytes: int) -> tuple[list[PrefixRow], list[int]]:
        """Return a row for each policy, and how many blocks ours loads for each request."""
        run = self._run(max_bytes)
        lru, lru_stored = replay_lru(self._requests, self._model, run.max_blocks)
        optimum = replay_optimum(self._requests, self._model, run.max_blocks)
        rows = [
            self._row(OURS, run.loaded, run.stored_blocks),
            self._row(LRU, lru, lru_stored),
            self._row(OPTIMUM, optimum, None),
        ]
        return rows, run.loaded

    def recommend(self, blocks: int) -> PrefixRecommendation:
        """Replay at sizes that double, up to one that has room for so many blocks."""
        whole_bytes = int(blocks * self._model.block_bytes / _INDEX_SHARE) + _INDEX_BYTES
        sizes = [max(whole_bytes >> halvings, MIN_BYTES) for halvings in range(_HALVINGS, -1, -1)]
        curve = [self._point(size) for size in sorted(set(sizes))]
        step_bytes = int(_STEP_SHARE * whole_bytes)
        enough = enough_bytes([(point.max_bytes, point.tokens) for point in curve], step_bytes)
        return PrefixRecommendation(enough, step_bytes, curve)

    def _point(self, max_bytes: int) -> PrefixPoint:
        run = self._run(max_bytes)
        optimum = replay_optimum(self._requests, self._model, run.max_blocks)
        row, most = self._row(OURS, run.loaded, None), self._row(OPTIMUM, optimum, None)
        return PrefixPoint(max_bytes, row.tokens, row.ratio, row.saved_s, most.tokens)

    def _run(self, max_bytes: int) -> TierRun:
        return replay_tier(self._requests, self._model, max_bytes, self._progress)

    def _row(self, policy: str, loaded: Sequence[int], stored: int | None) -> PrefixRow:
        tokens = sum(loaded) * self._model.block_tokens
        return PrefixRow(
            policy=policy,
            loads=sum(map(bool, loaded)),
            tokens=tokens,
            ratio=ratio(tokens, self.tokens),
            reuse_ratio=ratio(tokens + self.reused, self.tokens),
            saved_s=self._model.saved_s(tokens),
            stored_bytes=None if stored is None else stored * self._model.block_bytes,
        )


def _model(config: Config, block_tokens: int, options: PromptOptions) -> PrefixModel:
    tier = config.tiers.prefix or PrefixTierConfig()
    return PrefixModel(
        block_tokens,
        options.bytes_per_token,
        options.compute_tokens_per_s,
        options.load_tokens_per_s,
        store_after=tier.store_after,
        min_tokens=tier.min_tokens,
        ttl_s=tier.ttl_s,
    )


def _limit(
    config: Config, options: PromptOptions, whole: tuple[str, int], warn: Warn
) -> int | None:
    if options.limit is not None:
        return parse_limit("--prefix", options.limit, whole, MIN_BYTES, warn)
    return None if config.tiers.prefix is None else int(config.tiers.prefix.max_bytes)


def _engine_blocks(
    text: str, trace: Trace, prompts: Sequence[TracePrompt], blocks: int, warn: Warn
) -> int:
    """Return how many blocks the engine's cache holds; it must hold the longest request."""
    is_share = text.endswith("%")
    try:
        tokens = float(text[:-1]) / 100 * blocks * trace.block_tokens if is_share else float(text)
        given = int(tokens) // trace.block_tokens
    except (ValueError, OverflowError):
        raise ConfigError([f"--engine-tokens: should be as 262144 or 10%, not {text!r}"]) from None
    least = max(taken_blocks(prompt, trace.block_tokens) for prompt in prompts)
    if given >= least:
        return given
    longest = f"{least * trace.block_tokens:,}, which the longest request of {trace.name} takes"
    if not is_share:
        raise ConfigError([f"--engine-tokens: should be at least {longest}; not {text}"])
    warn(f"--engine-tokens: {text} is {int(tokens):,}; raised to {longest}")
    return least
