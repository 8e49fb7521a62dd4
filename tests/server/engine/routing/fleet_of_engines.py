"""Engines that count the blocks of prompts, and what a choice among them comes to."""

import heapq
import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import inf, isfinite
from pathlib import Path
from typing import NamedTuple

from server.engine.routing.choice import Beginnings, Rotation, by_load, within_bound
from server.simulation.engine_cache import EngineCache
from server.simulation.traces import MOONCAKE_BLOCK_TOKENS, TracePrompt, read

MOONCAKE = Path("tests/data/mooncake_synthetic_trace_end.jsonl")
ENGINE_BLOCKS, TOKENS_PER_S = 4000, 10_000.0
# How busy the engines would be if each beginning were computed once.
BUSY = 0.6


READ_EVERY_S = 2.0


class Engine:
    """An engine that computes one prompt after the other, and keeps what it has computed."""

    def __init__(self, blocks: int, fronts: int, tokens_per_s: float = TOKENS_PER_S) -> None:
        self.tokens_per_s = tokens_per_s
        self.cache = EngineCache(blocks, MOONCAKE_BLOCK_TOKENS)
        self.free_at = self.computed = 0.0
        # What each front has sent here: tokens and requests.
        self.loads, self.requests = [0.0] * fronts, [0] * fronts

    def take(self, prompt: TracePrompt) -> tuple[int, float]:
        """Return how many tokens of a prompt were cached, and when its answer ends."""
        cached = self.cache.ask(prompt) * MOONCAKE_BLOCK_TOKENS
        work = prompt.tokens - cached + prompt.output_tokens
        self.computed += work
        self.free_at = max(self.free_at, prompt.at_s) + work / self.tokens_per_s
        return cached, self.free_at


class Outcome(NamedTuple):
    """What the engines of a fleet did."""

    hit_ratio: float
    """Cached tokens of all tokens."""
    imbalance: float
    """The most that one engine computed, of the mean."""
    mean_s: float
    """How long an answer took."""


Chooser = Callable[[TracePrompt, Sequence[float]], int]


def serve(
    prompts: Sequence[TracePrompt],
    number: int,
    choose: Chooser,
    fronts: int = 1,
    *,
    reads_queues: bool = False,
    dead: range = range(0),
    slow: float = 1.0,
) -> Outcome:
    """Have engines answer the prompts, each one by that which `choose` names.

    Each of several fronts gets prompts by chance, and knows only of those that it has sent; and, if
    they read the engines' queues, how many others there were at the last time.

    Args:
        prompts: in the order of their times.
        number: of engines.
        choose: returns the number of one, by the load that a front knows of; it is infinite where
            one is down.
        fronts: how many there are.
        reads_queues: whether they read queues.
        dead: the prompts during which the first engine is down; it comes back with nothing.
        slow: what the last engine computes in a second, of what the others do.
    """
    engines, chance = [Engine(ENGINE_BLOCKS, fronts) for _ in range(number)], random.Random(2)
    engines[-1].tokens_per_s *= slow
    under_way: list[tuple[float, int, int, float]] = []
    cached, mean, read_at_s, took_s = 0, 0.0, -READ_EVERY_S, 0.0
    # The requests of others at each engine, as each front has read them.
    foreign = [[0] * number for _ in range(fronts)]
    for at, prompt in enumerate(prompts):
        if dead and at == dead.start:
            computed, engines[0] = engines[0].computed, Engine(ENGINE_BLOCKS, fronts)
            engines[0].computed = computed
            under_way = [each for each in under_way if each[1]]
            heapq.heapify(under_way)
        while under_way and under_way[0][0] <= prompt.at_s:
            _, ended, front, weight = heapq.heappop(under_way)
            engines[ended].loads[front] -= weight
            engines[ended].requests[front] -= 1
        if reads_queues and prompt.at_s >= read_at_s + READ_EVERY_S:
            read_at_s = prompt.at_s
            foreign = [
                [sum(engine.requests) - engine.requests[front] for engine in engines]
                for front in range(fronts)
            ]
        front = chance.randrange(fronts)
        others = [mean * count for count in foreign[front]]
        loads = [engine.loads[front] + more for engine, more in zip(engines, others, strict=True)]
        if at in dead:
            loads[0] = inf
        chosen = choose(prompt, loads)
        found, ends_at = engines[chosen].take(prompt)
        cached += found
        took_s += ends_at - prompt.at_s
        weight = prompt.tokens - found
        mean += 0.05 * (weight - mean)
        engines[chosen].loads[front] += weight
        engines[chosen].requests[front] += 1
        heapq.heappush(under_way, (ends_at, chosen, front, weight))
    computed = [engine.computed for engine in engines]
    return Outcome(
        cached / sum(prompt.tokens for prompt in prompts),
        max(computed) * number / sum(computed),
        took_s / len(prompts),
    )


def oracle(prompts: Sequence[TracePrompt], number: int) -> float:
    """Return the hit ratio of one engine that has the memory of all."""
    cache = EngineCache(ENGINE_BLOCKS * number, MOONCAKE_BLOCK_TOKENS)
    cached = sum(cache.ask(prompt) for prompt in prompts) * MOONCAKE_BLOCK_TOKENS
    return cached / sum(prompt.tokens for prompt in prompts)


def mooncake(
    copies: int, engines: int, *, shared_blocks: int = 0, hot_every: int = 0
) -> list[TracePrompt]:
    """Return a piece of a real trace at scale: several at once, of other contexts each.

    Args:
        copies: how many.
        engines: that it keeps busy.
        shared_blocks: with which all prompts begin.
        hot_every: so many prompts have one among them that is about the same context.
    """
    piece = [*read(MOONCAKE).prompts.values()]
    first, last = piece[0].at_s, piece[-1].at_s
    shared = tuple(range(-shared_blocks, 0))
    prompts = [
        prompt._replace(
            tokens=prompt.tokens + shared_blocks * MOONCAKE_BLOCK_TOKENS,
            blocks=shared + tuple(copy * 10**6 + block for block in prompt.blocks),
            at_s=(prompt.at_s - first) / (last - first) + copy / copies / len(piece),
        )
        for copy in range(copies)
        for prompt in piece
    ]
    prompts.sort(key=lambda prompt: prompt.at_s)
    if hot_every:
        for number, prompt in enumerate(prompts[::hot_every]):
            hot = piece[3]._replace(at_s=prompt.at_s)
            prompts[number * hot_every] = hot._replace(blocks=(*hot.blocks[:-1], -1000 - number))
    tokens = sum(prompt.tokens + prompt.output_tokens for prompt in prompts)
    work = tokens * (1 - oracle(prompts, engines))
    takes_s = work / (BUSY * engines * TOKENS_PER_S)
    return [prompt._replace(at_s=prompt.at_s * takes_s) for prompt in prompts]


def beginnings_of(prompt: TracePrompt) -> list[int]:
    """Return the digests of a prompt's beginnings.

    The last block stands for the question, which is a message of its own.
    """
    blocks = prompt.blocks
    cuts = sorted({min(cut, len(blocks)) for cut in (1, 2, 8, max(len(blocks) - 1, 1), 10**6)})
    keys = [repr(blocks[:cut]).encode() for cut in cuts]
    return [int.from_bytes(blake2b(key, digest_size=8).digest()) for key in keys]


def by_prefix(engines: int, processes: int = 1) -> Chooser:
    """Return the choice of several processes, which get prompts by chance."""
    names, chance = [f"http://engine-{number}" for number in range(engines)], random.Random(1)
    all_known = [Beginnings() for _ in range(processes)]

    def choose(prompt: TracePrompt, loads: Sequence[float]) -> int:
        known, digests = chance.choice(all_known), beginnings_of(prompt)
        preference = known.prefer(digests, names)
        known.count(digests)
        return within_bound(preference, there(loads), loads, prompt.tokens).order[0]

    return choose


def there(loads: Sequence[float]) -> list[int]:
    """Return the numbers of the engines that aren't down."""
    return [number for number, load in enumerate(loads) if isfinite(load)]


def by_least(engines: int) -> Chooser:
    rotation = Rotation()
    return lambda _, loads: by_load(rotation.next(there(loads)), loads)[0]


def in_turn(engines: int) -> Chooser:
    rotation = Rotation()
    return lambda _, loads: rotation.next(there(loads))[0]
