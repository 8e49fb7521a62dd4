"""What an engine's scheduler decides: which blocks are loaded from disk, and which are stored.

It knows requests by their chains, and blocks of the engine's cache by their numbers. It reads the
index, and writes nothing; `Bookkeeper` writes in the background.

A request loads at most once. So a load that fails is computed, and never tried again and again.
While a block is being loaded, other requests for it wait, and find it in the engine's cache then.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tiers.prefix_kv import policy
from tiers.prefix_kv.counters import EngineCounts
from tiers.prefix_kv.engine.orders import LoadOrder, SaveOrder, StepOrders
from tiers.prefix_kv.engine.rates import LoadGate
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.record import BlockChain
from tiers.prefix_kv.store import Location

_MAX_LOADS = 8
"""At once; more requests wait, as long as a load may take."""
_LOOKUP_S = 0.25
"""How long a lookup holds for a request that waits for room in the engine's cache."""
_HELD_S = 60.0
_MAX_HELD = 65536


class Books(Protocol):
    """What the planner tells of requests; see `Bookkeeper`."""

    counts: EngineCounts

    def record(self, hashes: Sequence[bytes]) -> list[int]: ...

    def estimate(self, hashes: Sequence[bytes]) -> list[int]: ...

    def touch(self, keys: Sequence[bytes], counts: Sequence[int]) -> None: ...


class RequestProgress(NamedTuple):
    """How far a request is after a step."""

    request: str
    blocks: int
    """Full blocks."""
    block_ids: Sequence[int]
    """Where its blocks are in the engine's cache."""


@dataclass(slots=True)
class _Request:
    chain: BlockChain
    counts: list[int]
    tokens: int
    is_warm: bool
    last: int
    """Blocks that may be loaded: at least one token is left to compute."""
    due: int
    """Blocks that may be stored."""
    purge_epoch: int
    """The last purge before the request: later ones hold for what it computes."""
    first: int = 0
    """Blocks that the engine's own cache had."""
    found: list[list[Location]] = field(default_factory=list)
    """Where blocks from `first` on are, for each worker."""
    looked_up_at: float | None = None
    waits_since: float | None = None
    has_loaded: bool = False
    loaded_tokens: int = 0
    seen: int = 0
    """Blocks that were considered for storing."""
    ready: int = 0
    """Blocks that might be."""


@dataclass(slots=True)
class _Load:
    keys: frozenset[bytes]
    tokens: int
    began_at: float
    computed_s: float
    """Seconds in which the engine had computed until then."""
    is_warm: bool


class Planner:
    """Plans for one engine.

    Args:
        index: of the store.
        bookkeeper: counts requests.
        scopes: returns the scope of each worker for an adapter, or for none.
        block_tokens: tokens of a block.
        store_after: how often a prefix must have been requested lately until it is stored.
        gate: decides whether a load is worth it.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        index: PrefixIndex,
        bookkeeper: Books,
        scopes: Callable[[str], Sequence[bytes]],
        *,
        block_tokens: int,
        store_after: int,
        gate: LoadGate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index, self._books, self._scopes = index, bookkeeper, scopes
        self._block_tokens, self._store_after = block_tokens, store_after
        self.gate, self._clock = gate, clock
        self._requests: dict[str, _Request] = {}
        self._loads: dict[str, _Load] = {}
        self._loading: set[bytes] = set()
        self._held: dict[bytes, float] = {}
        """Until when blocks aren't looked for, since they are stored or were ordered to be."""
        self._held_epoch = 0
        self._orders = StepOrders()
        self.room = sys.maxsize
        """How many more blocks may be ordered to be stored: those for which workers have memory.

        The rest of a request's blocks is ordered in its later steps."""

    def add(self, request: str, chain: BlockChain, prompt_tokens: int, *, is_warm: bool) -> None:
        """Take in a new request. One that only warms the engine's cache isn't counted."""
        hashes = [name.hash for name in chain.names]
        counts = self._books.estimate(hashes) if is_warm else self._books.record(hashes)
        last = min(len(hashes), (prompt_tokens - 1) // self._block_tokens)
        due = policy.due(counts, self._store_after)
        self._requests[request] = _Request(
            chain, counts, prompt_tokens, is_warm, last, due, self._index.purge_epoch()
        )
        if hashes and not is_warm and counts[0] > 1:
            for scope in self._scopes(chain.adapter):
                self._books.touch([scope + each for each in hashes], counts)

    def match(self, request: str, computed: int) -> int | None:
        """Return how many blocks can be loaded beyond those that the engine's cache has.

        `None` if that will be known later. It changes nothing but what is remembered of lookups, so
        it may be called again.
        """
        state = self._requests.get(request)
        if state is None or state.has_loaded or computed >= state.last:
            return 0
        if state.chain.names[computed].hash in self._loading:
            return self._wait(state)
        now, before = self._clock(), state.looked_up_at
        if before is None or state.first != computed or now > before + _LOOKUP_S:
            state.first, state.looked_up_at = computed, now
            state.found = self._look_up(state, computed)
            if before is None and not state.is_warm:
                self._books.counts.add("lookups")
                self._books.counts.add(
                    "queried_tokens", state.tokens - computed * self._block_tokens
                )
        blocks = len(state.found)
        if not blocks or not self.gate.is_worth(blocks * self._block_tokens):
            return 0
        return self._wait(state) if len(self._loads) >= _MAX_LOADS else blocks

    def load(self, request: str, blocks: int, block_ids: Sequence[int]) -> None:
        """Order a load into the blocks that the engine has taken for it.

        Args:
            request: one for which `match` has returned a number.
            blocks: that number.
            block_ids: all blocks of the request.
        """
        state = self._requests[request]
        state.has_loaded, tokens = True, blocks * self._block_tokens
        names = state.chain.names[state.first : state.first + blocks]
        keys = frozenset(name.hash for name in names)
        self._loads[request] = _Load(
            keys, tokens, self._clock(), self.gate.computed_s, state.is_warm
        )
        self._loading |= keys
        order = LoadOrder(
            request, list(block_ids[state.first : state.first + blocks]), state.found[:blocks],
            self.gate.deadline_s(tokens),
        )  # fmt: skip
        self._orders.loads.append(order)

    def give_up(self, request: str) -> None:
        """Forget a request whose load can't be ordered, and have the engine compute it."""
        self._requests.pop(request, None)
        self._orders.lost.append(request)

    def take_orders(self) -> StepOrders:
        """Return the loads that were ordered since the last call."""
        orders, self._orders = self._orders, StepOrders()
        return orders

    def is_due(self, request: str, blocks: int) -> bool:
        """Return whether a request has blocks to store that it hadn't before, if it has so many."""
        state = self._requests.get(request)
        return state is not None and min(blocks, state.due) > state.seen

    def saves(self, progress: Iterable[RequestProgress]) -> list[SaveOrder]:
        """Return which blocks are to be stored in a step, after which the requests are so far."""
        saves: list[SaveOrder] = []
        for request, blocks, block_ids in progress:
            state = self._requests.get(request)
            if state is None:
                continue
            end = min(blocks, state.due, len(block_ids))
            state.ready, room = max(end, state.ready), self.room - len(saves)
            if end > state.seen and room > 0:
                saves += self._saves(state, end, block_ids, room)
        self.room -= len(saves)
        return saves

    def finish_load(self, request: str, failed: bool) -> None:
        """Note that a load is over."""
        load = self._loads.pop(request, None)
        if load is None:
            return
        self._loading = set().union(*(each.keys for each in self._loads.values()))
        seconds = self._clock() - load.began_at
        counts = self._books.counts
        if failed:
            # What was damaged is stored again when it is computed.
            for key in load.keys:
                self._held.pop(key, None)
            self.gate.note_failed()
            counts.add("failed_loads")
            counts.add("lost_seconds", seconds)
            return
        # A load begins and ends between steps, so beside long steps it seems long.
        computed_s = self.gate.computed_s - load.computed_s
        saved_s = self.gate.note_loaded(load.tokens, max(seconds - computed_s, 0.0))
        if (state := self._requests.get(request)) is not None:
            state.loaded_tokens = load.tokens
        if load.is_warm:
            counts.add("warmed_tokens", load.tokens)
        else:
            counts.add("hits")
            counts.add("loaded_tokens", load.tokens)
            counts.add("load_seconds", seconds)
            counts.add("saved_seconds" if saved_s >= 0 else "lost_seconds", abs(saved_s))

    def remove(self, request: str) -> int:
        """Forget a request that is over; returns how many of its tokens were loaded."""
        state = self._requests.pop(request, None)
        if state is None:
            return 0
        if state.ready > state.seen:
            self._books.counts.add("dropped_blocks", state.ready - state.seen)
        return state.loaded_tokens

    def _wait(self, state: _Request) -> int | None:
        """Return `None` as long as a load may take, and 0 afterwards."""
        now = self._clock()
        if state.waits_since is None:
            state.waits_since = now
        wait_s = self.gate.deadline_s(state.last * self._block_tokens)
        return None if now < state.waits_since + wait_s else 0

    def _look_up(self, state: _Request, first: int) -> list[list[Location]]:
        chain = state.chain._replace(names=state.chain.names[first : state.last])
        by_worker = [
            self._index.lookup(chain._replace(scope=scope)) for scope in self._scopes(chain.adapter)
        ]
        return [list(map(Location.of, blocks)) for blocks in zip(*by_worker, strict=False)]

    def _saves(
        self, state: _Request, end: int, block_ids: Sequence[int], room: int
    ) -> list[SaveOrder]:
        """Return orders for blocks before `end` that the store doesn't hold, if there is room."""
        now, latest = self._clock(), self._index.purge_epoch()
        names = state.chain.names
        if latest != self._held_epoch or len(self._held) + len(names) > _MAX_HELD:
            self._held, self._held_epoch = {}, latest
        positions = range(state.seen, end)
        unknown = [at for at in positions if self._held.get(names[at].hash, 0) <= now]
        if len(unknown) > room:
            end = unknown[room]
            del unknown[room:]
        state.seen = end
        if not unknown:
            return []
        scopes = self._scopes(state.chain.adapter)
        held = self._index.holds([scope + names[at].hash for at in unknown for scope in scopes])
        if state.purge_epoch == latest:
            # Otherwise the store may refuse them, and later requests' are to be stored.
            self._held |= dict.fromkeys((names[at].hash for at in unknown), now + _HELD_S)
        return [
            SaveOrder(block_ids[at], state.chain, at, state.counts[at], state.purge_epoch)
            for at in unknown
            if not all(scope + names[at].hash in held for scope in scopes)
        ]
