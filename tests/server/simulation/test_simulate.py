"""Simulation: traces are read as they are meant, and replays give the counts that are known."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from server.cli import main
from server.config.base import ConfigError
from server.config.schema import CacheConfig, Config, MemoryTierConfig, TiersConfig
from server.simulation import references
from server.simulation.recommend import recommend
from server.simulation.simulate import memory_overhead_bytes, simulate, with_limits
from server.simulation.traces import Trace, TraceError, TracePrompt, TraceRequest, read
from tests.tiers.policies.replay import SEED_EXAMPLE, count_hits, count_hits_of_optimum
from tiers import WritePolicy, digest
from tiers.policies import POLICIES

DATA = Path("tests/data")
SEED = Trace("seed", [TraceRequest(f"user{user}", 1) for user in SEED_EXAMPLE])
NEEDS_LIBCACHESIM = pytest.mark.skipif(
    not references.is_installed(), reason="libcachesim isn't installed"
)


def memory_for(entries: int, size: int, policy: str = "lru", **cache: object) -> Config:
    """Return a memory tier that has room for so many entries of one size, and no disk."""
    max_bytes = entries * (size + memory_overhead_bytes(policy))
    memory = MemoryTierConfig.model_construct(max_bytes=max_bytes, policy=policy)
    return Config(tiers=TiersConfig(memory=memory, disk=None), cache=CacheConfig(**cache))


def write(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("capacity", "policy", "hits"),
    [
        (3, "fifo", 0), (3, "lru", 0), (3, "lfu", 0),
        (5, "fifo", 1), (5, "lru", 1), (5, "lfu", 1),
        (7, "fifo", 3), (7, "lru", 3), (7, "lfu", 3),
    ],
)  # fmt: skip
def test_the_seed_example_has_the_true_counts(capacity: int, policy: str, hits: int) -> None:
    result = simulate(memory_for(capacity, 1, policy), SEED).result
    (memory,) = result.tiers
    assert (memory.requests, memory.hits, result.hits) == (15, hits, hits)
    assert memory.stores == 15 - hits
    assert memory.evictions == 15 - hits - capacity
    assert memory.entries == capacity
    assert result.hit_ratio == result.byte_hit_ratio == hits / 15


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_finds_what_its_policy_alone_would(policy: str) -> None:
    # Shortened, so that keys repeat.
    keys = [request.key[:3] for request in read(DATA / "azure_llm_code.csv").requests]
    cost = 500 + memory_overhead_bytes(policy)
    alone = POLICIES[policy].within(20 * cost)
    hits = count_hits(alone, [digest(key.encode()) for key in keys], cost)
    trace = Trace("short", [TraceRequest(key, 500) for key in keys])
    assert simulate(memory_for(20, 500, policy), trace).result.hits == hits > 20


@NEEDS_LIBCACHESIM
@pytest.mark.parametrize("capacity", [3, 5, 7])
def test_references_have_the_room_of_the_memory_tier(capacity: int) -> None:
    overhead_bytes = memory_overhead_bytes("lru")
    max_bytes = capacity * (1 + overhead_bytes)
    lru = references.compare(SEED, "LRU", max_bytes, overhead_bytes)
    assert lru.hits == simulate(memory_for(capacity, 1), SEED).result.hits
    optimum = references.compare(SEED, "Belady", max_bytes, overhead_bytes)
    assert optimum.hits == count_hits_of_optimum(capacity, SEED_EXAMPLE)


@NEEDS_LIBCACHESIM
@pytest.mark.parametrize("policy", [*references.ONLINE, references.OPTIMUM])
@pytest.mark.parametrize(("cost", "max_bytes"), [(1, 3), (1, 12), (575, 3), (575, 575)])
def test_references_have_no_least_room(policy: str, cost: int, max_bytes: int) -> None:
    """Some policies of libcachesim abort the process if one of their parts has 0 bytes."""
    hits = references.replay(policy, [(key, cost) for key in SEED_EXAMPLE], max_bytes)
    assert len(hits) == len(SEED_EXAMPLE)
    most = count_hits_of_optimum(max_bytes // cost, SEED_EXAMPLE) if cost <= max_bytes else 0
    assert sum(hits) <= most


def test_disk_answers_what_memory_evicted() -> None:
    config = memory_for(1, 10)
    config = with_limits(config, SEED, None, "1MiB")
    trace = Trace("ab", [TraceRequest(key, 10, tokens=3) for key in "ABABA"])
    replay = simulate(config, trace)
    memory, disk = replay.result.tiers
    # A, asked for twice, beats B; then B doesn't beat A.
    assert list(replay.answered_by) == [2, 2, 1, 1, 0]
    assert (memory.requests, memory.hits, memory.stores) == (5, 1, 3)
    assert (memory.promotions, memory.evictions) == (1, 2)
    assert (disk.requests, disk.hits, disk.stores) == (4, 2, 2)
    assert replay.result.disk_writes_per_request == 2 / 5
    assert (replay.result.tokens, replay.result.tokens_saved) == (15, 9)


def test_what_memory_evicts_is_demoted_before_the_next_request() -> None:
    config = with_limits(memory_for(1, 10), SEED, None, "1MiB")
    tiers = config.tiers.model_copy(update={"write": WritePolicy.ON_EVICT})
    trace = Trace("abc", [TraceRequest(key, 10) for key in "ABCA"])
    replay = simulate(config.model_copy(update={"tiers": tiers}), trace)
    assert list(replay.answered_by) == [2, 2, 2, 1]
    # C, too, since A was promoted in its place.
    assert replay.result.tiers[1].demotions == replay.result.tiers[1].stores == 3


def test_virtual_time_makes_entries_expire() -> None:
    times = [1000, 1009, 1011, 1012, 1005]
    trace = Trace("a", [TraceRequest("A", 10, at_s=at_s) for at_s in times])
    replay = simulate(memory_for(3, 10, ttl_s=10, ttl_jitter=0), trace)
    # The last one came out of order, and time doesn't run backwards.
    assert list(replay.answered_by) == [1, 0, 1, 0, 0]
    assert replay.result.tiers[0].expirations == 1


def test_stale_answers_are_given_out_and_renewed() -> None:
    trace = Trace("a", [TraceRequest("A", 10, at_s, 1) for at_s in (0, 11, 12)])
    config = memory_for(3, 10, ttl_s=10, ttl_jitter=0, stale_while_revalidate_s=5)
    replay = simulate(config, trace)
    assert list(replay.answered_by) == [1, 0, 0]
    # The second answer had to be generated all the same.
    assert replay.result.tokens_saved == 1
    only_if_error = memory_for(3, 10, ttl_s=10, ttl_jitter=0, stale_if_error_s=5)
    assert list(simulate(only_if_error, trace).answered_by) == [1, 1, 0]


def test_limits_are_sizes_or_shares_of_the_footprint() -> None:
    trace = Trace(
        "big",
        [TraceRequest("A", 4 * 1024**2), TraceRequest("A", 1), TraceRequest("B", 4 * 1024**2)],
    )
    tiers = with_limits(Config(), trace, "10%", "2MiB").tiers
    assert tiers.memory is not None
    assert tiers.disk is not None
    assert tiers.memory.max_bytes == 8 * 1024**2 // 10
    assert tiers.disk.max_bytes == 2 * 1024**2
    assert with_limits(Config(), trace, "1MiB", "none").tiers.disk is None


def test_a_share_is_at_least_what_a_tier_can_have(tmp_path: Path, capsys) -> None:
    file = write(tmp_path, "t.csv", "key,size\na,1000\na,1000\nb,1000\n")
    assert main(["simulate", str(file), "--disk", "50%", "--json"]) == 0
    out, err = capsys.readouterr()
    disk = orjson.loads(out)["traces"][0]["chain"]["tiers"][1]
    assert (disk["name"], disk["max_bytes"]) == ("disk", 1024**2)
    expected = "--disk: 50% of t is 1000B; raised to the smallest limit, 1.0MiB\n"
    assert err == expected


def test_whoever_reads_may_stop(tmp_path: Path) -> None:
    file = write(tmp_path, "t.csv", "key,size\na,1000\n")
    command = [sys.executable, "-m", "server.cli", "simulate", str(file), "--disk", "none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("memory", "disk", "message"),
    [
        ("much", None, "--memory: should be as 64MiB, 10%, or none, not 'much'"),
        ("nan%", None, "--memory: should be as"),
        ("0", None, "--memory: should be at least 1B, not 0"),
        (None, "10KiB", "--disk: should be at least 1.0MiB, not 10KiB"),
        (None, "0%", "--disk: should be at least 1.0MiB, not 0%"),
        ("none", "none", "tiers: should be at least one"),
    ],
)
def test_wrong_limits_are_mistakes(memory: str | None, disk: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_limits(Config(), SEED, memory, disk)


def test_recommends_the_size_beyond_which_more_buys_little() -> None:
    # Two keys are asked for again and again, and a hundred once.
    keys = [key for number in range(100) for key in ("A", f"once{number}", "B")]
    found = recommend(memory_for(1, 1), Trace("k", [TraceRequest(key, 1000) for key in keys]))
    assert [point.hits for point in found.curve][-1] == 198
    assert all(left.max_bytes < right.max_bytes for left, right in pairwise(found.curve))
    enough = next(point for point in found.curve if point.max_bytes == found.max_bytes)
    assert enough.hits == 198
    assert found.curve[found.curve.index(enough) - 1].hits < 198
    never = recommend(memory_for(1, 1), Trace("k", [TraceRequest("A", 1)]))
    assert never.curve[-1].hits == 0


def test_reads_keys_and_sizes(tmp_path: Path) -> None:
    expected = [TraceRequest("a,b", 10, 1.5, 7), TraceRequest("2", 20, 2.0, 0)]
    rows = 'tokens,key,size,time\n7,"a,b",10,1.5\n,2,20,2\n'
    assert read(write(tmp_path, "t.csv", rows)) == Trace("t", expected)
    lines = '{"key":"a,b","size":10,"time":1.5,"tokens":7}\n\n{"key":2,"size":20,"time":2}\n'
    assert read(write(tmp_path, "t.jsonl", lines)) == Trace("t", expected)
    # As spreadsheets write it.
    assert read(write(tmp_path, "t.csv", "\ufeffkey,size\nx,1\n")).requests == [
        TraceRequest("x", 1)
    ]


def test_reads_block_storage(tmp_path: Path) -> None:
    file = write(tmp_path, "t.csv", "version,time,op,size,lbn\n1,5633898,2a,512,42932745\n")
    assert read(file).requests == [TraceRequest("42932745", 512, 5633898)]


def test_reads_azure() -> None:
    trace = read(DATA / "azure_llm_code.csv")
    first, second = trace.requests[:2]
    assert len(trace.requests) == 200
    assert (first.key, first.size, first.tokens) == ("4808,10", 512 + 4 * 10, 10)
    assert second.at_s - first.at_s == pytest.approx(0.052)


def test_reads_mooncake() -> None:
    trace = read(DATA / "mooncake_synthetic_trace.jsonl")
    first = trace.requests[0]
    assert len(trace.requests) == 60
    assert (first.size, first.at_s, first.tokens) == (512 + 4 * 6, 0, 6)
    assert first.key == str(list(range(79)))
    prompt = trace.prompts[first.key]
    # The last of the 79 blocks isn't full.
    assert prompt == TracePrompt(40160, tuple(range(78)), 6, 0)
    assert trace.block_tokens == 512


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "t.csv:1: should hold requests, each with its key, size; or lbn, size; or"),
        ("t.csv", "key,size\n", "t.csv:1: should hold requests"),
        ("t.csv", "key,bytes\na,1\n", "t.csv:2: should have key, size; or .*; not key, bytes"),
        ("t.csv", "key,size\na,1\nb,-1\n", "t.csv:3: size should be a whole number, not '-1'"),
        ("t.csv", "key,size\na,1\nb\n", "t.csv:3: size is missing"),
        ("t.csv", "key,size,time\na,1,inf\n", "t.csv:2: time should be a number from 0"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,1\n", "2: TIMESTAMP should be a"),
        ("t.csv", "key,size\n\xff\n".encode("latin-1"), "t.csv: can't be read as CSV"),
        ("t.jsonl", '{"key":1,"size":1}\n{"key":1', "t.jsonl:2: should be JSON"),
        ("t.jsonl", "[1]\n", "t.jsonl:1: should be a JSON object"),
        ("t.jsonl", '{"key":1,"size":1.5}', "t.jsonl:1: size should be a whole number, not '1.5'"),
        ("t.jsonl", '{"timestamp":0,"output_length":1,"hash_ids":3}', "hash_ids should be"),
        ("t.jsonl", '{"time":1,"key":"a","blocks":[1]}', "blocks should be a list of digests"),
        ("t.jsonl", '{"time":1,"blocks":[]}', "t.jsonl:1: key is missing"),
    ],
)  # fmt: skip
def test_mistakes_name_the_line(
    tmp_path: Path, capsys, name: str, text: str | bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TraceError, match=message):
        read(file)
    assert main(["simulate", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_missing_trace_is_a_mistake(tmp_path: Path, capsys) -> None:
    assert main(["simulate", str(tmp_path / "no.csv")]) == 2
    assert main(["simulate", str(tmp_path / "no.jsonl")]) == 2
    assert capsys.readouterr().err.count(": should be a readable file: No such file") == 2


def test_prints_tables_for_every_trace(capsys) -> None:
    traces = ["azure_llm_code.csv", "mooncake_synthetic_trace.jsonl"]
    paths = [str(DATA / name) for name in traces]
    options = ["--memory", "50%", "--disk", "1MiB", "--prefix", "4GiB", "--engine-tokens", "300000"]
    assert main(["simulate", *paths, *options, "--recommend"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for part in ("azure_llm_code: 200 requests", "mooncake_synthetic_trace: 60 requests",
                 "promotions", "disk writes per request", "output tokens saved", "prefix blocks",
                 "LRU, stores all", "optimum", "the prefix tier by size",
                 "recommended"):  # fmt: skip
        assert part in printed.out


def test_prints_json(tmp_path: Path, capsys) -> None:
    config = write(tmp_path, "c.yaml", "tiers: {disk: {compression: zstd}}")
    trace = str(DATA / "mooncake_synthetic_trace.jsonl")
    assert main(["simulate", trace, "--json", "--config", str(config)]) == 0
    printed = orjson.loads(capsys.readouterr().out)
    (report,) = printed["traces"]
    assert report["requests"] == 60
    assert [tier["name"] for tier in report["chain"]["tiers"]] == ["memory", "disk"]
    assert 0 < report["prefixes"]["engine_reused"] < report["prefixes"]["tokens"]
    assert report["prefixes"]["rows"] == []
    assert any("compression" in note for note in printed["notes"])


def test_a_shared_tier_is_left_out_and_said_so(tmp_path: Path, capsys) -> None:
    config = write(tmp_path, "c.yaml", "tiers: {shared: {url: 'redis://nowhere'}}")
    trace = str(DATA / "azure_llm_code.csv")
    assert main(["simulate", trace, "--config", str(config), "--json"]) == 0
    printed = orjson.loads(capsys.readouterr().out)
    assert [tier["name"] for tier in printed["traces"][0]["chain"]["tiers"]] == ["memory", "disk"]
    assert any(note.startswith("no shared tier") for note in printed["notes"])


def test_says_that_libcachesim_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(references, "is_installed", lambda: False)
    assert main(["simulate", str(DATA / "azure_llm_code.csv"), "--disk", "none"]) == 0
    printed = capsys.readouterr().out
    assert "libcachesim isn't installed" in printed
    assert "Belady" not in printed


@pytest.mark.parametrize(
    ("name", "start", "options"),
    [("p.png", b"\x89PNG", []), ("p.svg", b"<?xml", ["--recommend"])],
    ids=["time", "size"],
)
def test_plots(tmp_path: Path, capsys, name: str, start: bytes, options: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    file = tmp_path / name
    trace, prompts = (
        str(DATA / name) for name in ("azure_llm_code.csv", "mooncake_synthetic_trace.jsonl")
    )
    options = [*options, "--disk", "none", "--prefix", "1GiB"]
    assert main(["simulate", trace, prompts, *options, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(start)
    assert main(["simulate", trace, "--plot", str(tmp_path / "no" / name)]) == 2
    assert "--plot: should be a writable path, not " in capsys.readouterr().err


def test_plots_are_png_or_svg(tmp_path: Path, capsys) -> None:
    trace = str(DATA / "azure_llm_code.csv")
    assert main(["simulate", trace, "--plot", str(tmp_path / "p.jpg")]) == 2
    assert "should end in .png or .svg" in capsys.readouterr().err


def test_the_command_starts_without_what_only_simulations_and_benchmarks_need() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import server.cli, sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    of_some = {
        "server.simulation.simulate",
        "matplotlib",
        "libcachesim",
        "numpy",
        "tqdm",
        "aiohttp",
    }
    assert not of_some & set(loaded)
