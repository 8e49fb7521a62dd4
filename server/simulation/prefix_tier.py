"""The prefix tier below an engine's cache: its own planner, policy and index, without the bytes.

The index is a real one in a temporary folder, so what is evicted is what the tier would evict. Only
time is virtual: a request comes at its time in the trace, and loads take as long as the given rate
says. Not simulated is what no trace has: requests that run at the same time, and blocks that are
dropped since the disk is slower than the engine.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

from server.simulation.engine_cache import reusable
from server.simulation.traces import TracePrompt
from tiers.prefix_kv import policy
from tiers.prefix_kv.counters import EngineCounts
from tiers.prefix_kv.data_file import PAGE_BYTES
from tiers.prefix_kv.engine.planner import Planner, RequestProgress
from tiers.prefix_kv.engine.rates import LoadGate
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.index.transaction import NewBlock
from tiers.prefix_kv.record import SCOPE_BYTES, BlockChain, BlockName
from tiers.prefix_kv.store import PrefixStore, StoreConfig

_SCOPE = bytes(SCOPE_BYTES)
_REQUEST = "request"

EngineRequest = tuple[TracePrompt, int]
"""A prompt, and how many of its blocks the engine's cache had."""
Progressing = Callable[[Sequence[EngineRequest], str], Iterable[EngineRequest]]
"""Yields the requests it is given, and shows progress under a name."""


@dataclass(frozen=True, slots=True)
class PrefixModel:
    """What the replay has to know of an engine and of the tier."""

    block_tokens: int
    bytes_per_token: int
    compute_tokens_per_s: float
    load_tokens_per_s: float
    store_after: int
    min_tokens: int
    ttl_s: float

    @property
    def block_bytes(self) -> int:
        """The size of a block."""
        return self.block_tokens * self.bytes_per_token

    def saved_s(self, tokens: int) -> float:
        """Return the seconds that loading so many tokens saves."""
        return tokens / self.compute_tokens_per_s - tokens / self.load_tokens_per_s


@dataclass(frozen=True, slots=True)
class TierRun:
    """What a prefix tier of a size did."""

    max_bytes: int
    max_blocks: int
    """That there is room for."""
    loaded: list[int]
    """Blocks loaded, for each request."""
    stored_blocks: int
    evicted_blocks: int


def replay_tier(
    requests: Sequence[EngineRequest], model: PrefixModel, max_bytes: int, progress: Progressing
) -> TierRun:
    """Replay an engine's requests against an empty tier."""
    with TemporaryDirectory(prefix="tierserve-simulate-") as folder:
        tier = _Tier(Path(folder), model, max_bytes)
        try:
            loaded = [tier.ask(*request) for request in progress(requests, "prefix blocks")]
        finally:
            tier.store.close()
    return TierRun(max_bytes, tier.max_blocks, loaded, tier.stored, tier.evicted)


class _Books:
    """The `Books` of the planner, written at once and not in the background."""

    def __init__(self, index: PrefixIndex, blocks: int) -> None:
        self.counts = EngineCounts()
        self._index, self._sketch = index, policy.new_sketch(blocks)

    def record(self, hashes: Sequence[bytes]) -> list[int]:
        return [self._sketch.record(each.hex()) for each in hashes]

    def estimate(self, hashes: Sequence[bytes]) -> list[int]:
        return [self._sketch.estimate(each.hex()) for each in hashes]

    def touch(self, keys: Sequence[bytes], counts: Sequence[int]) -> None:
        self._index.touch([(keys, counts)])


class _Tier:
    def __init__(self, folder: Path, model: PrefixModel, max_bytes: int) -> None:
        self._model, self._now = model, 0.0
        self.stored = self.evicted = 0
        config = StoreConfig(folder, max_bytes, ttl_s=model.ttl_s, syncs=False)
        self.store = PrefixStore(config, self._clock)
        self.max_blocks = self.store.limit_pages // -(-model.block_bytes // PAGE_BYTES)
        self._gate = LoadGate(model.min_tokens, self._clock)
        self._planner = Planner(
            self.store.index,
            _Books(self.store.index, max(self.max_blocks, 1)),
            lambda _adapter: (_SCOPE,),
            block_tokens=model.block_tokens,
            store_after=model.store_after,
            gate=self._gate,
            clock=self._clock,
        )

    def ask(self, prompt: TracePrompt, computed: int) -> int:
        """Serve a prompt of which the engine has `computed` blocks; returns how many are loaded."""
        model, planner = self._model, self._planner
        self._now = max(self._now, prompt.at_s)
        numbers = range(len(prompt.blocks))
        planner.add(_REQUEST, _chain(prompt), prompt.tokens, is_warm=False)
        if loaded := planner.match(_REQUEST, computed) or 0:
            planner.load(_REQUEST, loaded, numbers)
            self._now += loaded * model.block_tokens / model.load_tokens_per_s
            planner.finish_load(_REQUEST, failed=False)
        rest = prompt.tokens - (computed + loaded) * model.block_tokens
        self._gate.note_computed(rest, rest / model.compute_tokens_per_s)
        planner.take_orders()
        saves = planner.saves([RequestProgress(_REQUEST, len(numbers), numbers)])
        blocks = [
            NewBlock(each.chain._replace(scope=_SCOPE), each.at, model.block_bytes, each.requests,
                     each.purge_epoch)
            for each in saves
        ]  # fmt: skip
        if blocks:
            # The bytes would be written here, between both.
            reserved, evicted = self.store.index.reserve(blocks)
            self.evicted += evicted
            self.stored += self.store.index.publish([(each, b"") for each in reserved])
        planner.remove(_REQUEST)
        return loaded

    def _clock(self) -> float:
        return self._now


def _chain(prompt: TracePrompt) -> BlockChain:
    hashes = [blake2b(b"%d" % block, digest_size=32).digest() for block in prompt.blocks]
    parents = [b"", *hashes]
    names = [BlockName(*each, b"") for each in zip(hashes, parents, strict=False)]
    return BlockChain(_SCOPE, names)


def wanted(prompt: TracePrompt, computed: int, block_tokens: int) -> Sequence[int]:
    """Return the blocks of a prompt that the engine's cache lacks and that may be reused."""
    return prompt.blocks[computed : reusable(prompt, block_tokens)]
