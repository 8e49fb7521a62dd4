"""Replays of prompts: engine, prefix tier and bounds do what is known of them."""

import random
from itertools import product
from pathlib import Path

import orjson
import pytest

from server.cli import main
from server.config.base import ConfigError
from server.config.schema import Config
from server.simulation.engine_cache import EngineCache, engine_prompts
from server.simulation.prefix_baselines import replay_lru, replay_optimum
from server.simulation.prefix_report import PrefixReuse, PromptOptions, replay_prefixes
from server.simulation.prefix_tier import PrefixModel, TierRun, replay_tier
from server.simulation.simulate import no_progress, simulate
from server.simulation.traces import Trace, TracePrompt, TraceRequest, read
from tiers.prefix_kv.index.index_file import FileLimits
from tiers.prefix_kv.store import MIN_BYTES

MOONCAKE = Path("tests/data/mooncake_synthetic_trace_end.jsonl")
PAGE_BYTES = 4096
# A limit, less the pages that are left for blocks.
INDEX_BYTES = MIN_BYTES - FileLimits.of(MIN_BYTES).data_pages * PAGE_BYTES
MODEL = PrefixModel(16, PAGE_BYTES // 16, 100, 10_000, store_after=2, min_tokens=16, ttl_s=1e6)
"""A block takes a page."""


def prompt(*blocks: int, rest: int = 1, output: int = 0, at_s: float = 0) -> TracePrompt:
    return TracePrompt(16 * len(blocks) + rest, blocks, output, at_s)


def tier_of(blocks: int) -> int:
    return INDEX_BYTES + blocks * PAGE_BYTES


def replay(
    prompts: list[TracePrompt], blocks: int = 100, engine: int = 0, **changes: object
) -> TierRun:
    """Replay prompts, of whose blocks the engine always has the same number."""
    fields = {name: getattr(MODEL, name) for name in MODEL.__slots__}
    model = PrefixModel(**(fields | changes))
    return replay_tier([(each, engine) for each in prompts], model, tier_of(blocks), no_progress)


def test_an_engine_reuses_full_blocks_from_the_beginning() -> None:
    cache = EngineCache(10, 16)
    assert [
        cache.ask(each)
        for each in (prompt(1, 2, 3), prompt(1, 2, 4), prompt(9, 2, 3), prompt(1, 2, 3, 5))
    ] == [0, 2, 0, 3]


def test_an_engine_computes_the_last_token() -> None:
    cache = EngineCache(10, 16)
    assert [cache.ask(prompt(1, 2, rest=0)) for _ in range(2)] == [0, 1]


def test_an_engine_evicts_the_end_of_the_oldest_prompt() -> None:
    cache = EngineCache(4, 16)
    cache.ask(prompt(1, 2))
    cache.ask(prompt(3))
    # It takes two blocks, of which one was empty: 2 leaves, 1 stays.
    cache.ask(prompt(4))
    assert cache.ask(prompt(1, 2)) == 1


def test_output_takes_blocks_as_well() -> None:
    few, many = EngineCache(5, 16), EngineCache(5, 16)
    for cache, output in ((few, 1), (many, 40)):
        cache.ask(prompt(1, 2))
        cache.ask(prompt(3, output=output))
    assert (few.ask(prompt(1, 2)), many.ask(prompt(1, 2))) == (2, 1)


def test_only_what_no_tier_answers_reaches_the_engine() -> None:
    requests = [TraceRequest(key, 1, at_s) for key, at_s in (("a", 1), ("b", 2), ("a", 3))]
    sampled = [(0, prompt(7)), (2, prompt(8)), (3, prompt(9)), (3, prompt(10))]
    trace = Trace("t", requests, {"a": prompt(1), "b": prompt(2)}, sampled, 16)
    asked = engine_prompts(trace, [1, 0, 1], 1)
    assert [(each.blocks, each.at_s) for each in asked] == [
        ((7,), 0), ((1,), 1), ((8,), 0), ((1,), 3), ((9,), 0), ((10,), 0),
    ]  # fmt: skip


def test_a_beginning_is_stored_at_its_second_request_and_loaded_at_its_third() -> None:
    run = replay([prompt(1, 2, 3), prompt(1, 2, 4), prompt(1, 2, 5)])
    assert (run.loaded, run.stored_blocks) == ([0, 0, 2], 2)
    assert replay([prompt(1, 2), prompt(1, 2)], store_after=1).loaded == [0, 2]


def test_what_the_engine_has_is_stored_but_not_loaded() -> None:
    prompts = [prompt(1, 2)] * 3
    run = replay_tier([(each, 2) for each in prompts], MODEL, tier_of(9), no_progress)
    assert (run.loaded, run.stored_blocks) == ([0, 0, 0], 2)


def test_short_and_slow_loads_are_left_out() -> None:
    prompts = [prompt(1, 2, rest=100)] * 4
    assert replay(prompts, min_tokens=33).loaded == [0] * 4
    # Once both rates are known, computing is faster.
    assert replay(prompts, load_tokens_per_s=50).loaded == [0, 0, 2, 0]


def test_blocks_expire_in_virtual_time() -> None:
    prompts = [prompt(1, 2, at_s=at_s) for at_s in (0, 1, 9, 102)]
    assert replay(prompts, ttl_s=100).loaded == [0, 0, 2, 0]


def test_a_tier_has_no_more_room_than_its_limit() -> None:
    prompts = [prompt(number, -number) for number in range(1, 31) for _ in range(2)]
    run = replay(prompts, blocks=8)
    assert run.max_blocks == 8
    assert run.stored_blocks - run.evicted_blocks == 8


def random_prompts(seed: int) -> list[TracePrompt]:
    """Return prompts that are paths in a tree, so that blocks have one chain each."""
    chance = random.Random(seed)
    prompts = []
    for at_s in range(60):
        node, blocks = 1, []
        for _ in range(chance.randint(1, 5)):
            node = 3 * node + chance.choice((0, 0, 1, 2))
            blocks.append(node)
        prompts.append(prompt(*blocks, at_s=at_s))
    return prompts


@pytest.mark.parametrize(("seed", "blocks"), [*product(range(5), (1, 4, 12, 40))])
def test_nobody_loads_more_than_the_optimum(seed: int, blocks: int) -> None:
    cache = EngineCache(7, 16)
    requests = [(each, cache.ask(each)) for each in random_prompts(seed)]
    most = sum(replay_optimum(requests, MODEL, blocks))
    ours = replay_tier(requests, MODEL, tier_of(blocks), no_progress)
    lru, _ = replay_lru(requests, MODEL, blocks)
    assert ours.max_blocks == blocks
    assert sum(ours.loaded) <= most
    assert sum(lru) <= most


@pytest.mark.parametrize("seed", range(5))
def test_with_room_for_all_lru_is_the_optimum(seed: int) -> None:
    cache = EngineCache(7, 16)
    requests = [(each, cache.ask(each)) for each in random_prompts(seed)]
    lru, stored = replay_lru(requests, MODEL, 10_000)
    assert lru == replay_optimum(requests, MODEL, 10_000)
    assert sum(lru) > 0
    assert stored == len({block for each, _ in requests for block in each.blocks})


def most_by_trying(requests: list[tuple[TracePrompt, int]], room: int) -> int:
    """Return how many blocks can be loaded, by trying all that a tier may hold after a request."""
    best = {frozenset[int](): 0}
    for each, computed in requests:
        after: dict[frozenset[int], int] = {}
        for held, loads in best.items():
            found = loads + len(held & set(each.blocks[computed:]))
            known = sorted(held | set(each.blocks))
            for bits in range(2 ** len(known)):
                kept = frozenset(block for at, block in enumerate(known) if bits >> at & 1)
                if len(kept) <= room:
                    after[kept] = max(after.get(kept, 0), found)
        best = after
    return max(best.values())


@pytest.mark.parametrize(("seed", "room"), [*product(range(4), (1, 2, 3))])
def test_the_optimum_is_what_trying_everything_finds(seed: int, room: int) -> None:
    chance = random.Random(seed)
    requests = []
    for _ in range(9):
        blocks = chance.choice([(1,), (1, 2), (1, 2, 3), (4,), (4, 5)])
        requests.append((prompt(*blocks), chance.randint(0, len(blocks))))
    assert sum(replay_optimum(requests, MODEL, room)) == most_by_trying(requests, room)


def report_of(trace: Trace, recommends: bool = False, **options: object) -> PrefixReuse:
    config = Config()
    found = replay_prefixes(
        config, trace, simulate(config, trace), PromptOptions(**options), no_progress,
        recommends=recommends,
    )  # fmt: skip
    assert found is not None
    return found.report


def test_a_slice_of_mooncake_is_reported() -> None:
    report = report_of(
        read(MOONCAKE), recommends=True, engine_tokens="150000", limit="8GiB", bytes_per_token=1000
    )
    ours, lru, optimum = report.rows
    assert report.engine_tokens == 150_000 // 512 * 512
    assert 0 < report.engine_reused < report.tokens
    assert 0 < ours.tokens <= optimum.tokens
    assert ours.reuse_ratio == (ours.tokens + report.engine_reused) / report.tokens
    assert ours.saved_s == pytest.approx(ours.tokens / 230 - ours.tokens / 100_000)
    assert ours.stored_bytes < lru.stored_bytes
    sizes = report.recommendation
    assert sizes.curve[-1].tokens == ours.tokens
    assert sizes.curve[0].tokens <= ours.tokens
    assert sizes.max_bytes <= sizes.curve[-1].max_bytes


def test_sizes_and_rates_are_checked(capsys) -> None:
    trace = read(MOONCAKE)
    with pytest.raises(ConfigError, match="--engine-tokens: should be as 262144 or 10%, not 'x'"):
        report_of(trace, engine_tokens="x")
    with pytest.raises(ConfigError, match=r"--engine-tokens: should be at least .*; not 512"):
        report_of(trace, engine_tokens="512")
    with pytest.raises(ConfigError, match=r"--prefix: should be at least 64\.0MiB, not 1MiB"):
        report_of(trace, limit="1MiB")
    assert main(["simulate", str(MOONCAKE), "--load-tokens-per-s", "nan"]) == 2
    assert "--load-tokens-per-s: should be a positive number, not nan" in capsys.readouterr().err
    assert main(["simulate", str(MOONCAKE), "--engine-tokens", "1%", "--prefix", "0.1%"]) == 0
    told = capsys.readouterr()
    assert "--engine-tokens: 1% is " in told.err
    assert "--prefix: 0.1% of mooncake_synthetic_trace_end is " in told.err
    assert "optimum" in told.out


def test_a_trace_of_sampled_requests_only_is_one(tmp_path: Path, capsys) -> None:
    line = {"time": 1, "outcome": "bypass", "prompt_tokens": 600, "characters": 2400,
            "blocks": ["0a", "0b"]}  # fmt: skip
    file = tmp_path / "t.jsonl"
    file.write_bytes(b"\n".join([orjson.dumps(line)] * 3))
    trace = read(file)
    assert trace.requests == []
    assert trace.block_tokens == 256
    assert [each for _, each in trace.bypassed] == [TracePrompt(600, (10, 11), 0, 1)] * 3
    assert main(["simulate", str(file), "--prefix", "64MiB", "--json", "--recommend"]) == 0
    (report,) = orjson.loads(capsys.readouterr().out)["traces"]
    assert report["requests"] == 0
    assert report["prefixes"]["requests"] == 3
    assert report["prefixes"]["engine_reused"] == 2 * 512
