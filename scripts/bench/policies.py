"""Miss ratios of our eviction policies on traces, beside libcachesim's.

Each trace is replayed against each policy at several cache sizes, given as shares of the trace's
footprint: the bytes of all different keys. Reads three kinds of traces, told by what they contain:

- CSV with `lbn` and `size` (block storage): the key is the block, the size is as given.
- CSV with `ContextTokens` and `GeneratedTokens` (Azure): it doesn't say which requests are alike,
  so the pair of lengths stands in for the key. Requests that are alike have alike lengths, but not
  the other way round: it is a stand-in, with more hits than the traffic had.
- JSONL with `hash_ids` (Mooncake), twice: as whole requests, whose key is the list of all prefix
  blocks, and as blocks of 512 tokens.

An answer is taken for `ENVELOPE_BYTES` and `TOKEN_BYTES` per token. A key keeps the size that it
had when it was let in. What alone is larger than the cache is a miss and is not let in.

Needs libcachesim (https://libcachesim.com), which has the policies to compare with.

Usage: policies.py TRACE... [--shares 0.001 0.01 0.1]
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import libcachesim
import orjson

from tiers import digest
from tiers.policies import DEFAULT, POLICIES

ENVELOPE_BYTES = 512
TOKEN_BYTES = 4
BLOCK_TOKENS = 512
REFERENCES = ("LRU", "LFU", "FIFO", "Random", "Sieve", "S3FIFO", "WTinyLFU", "ARC")
OPTIMUM = "Belady"
NEVER = 2**62


class Request(NamedTuple):
    """One request of a trace."""

    key: str
    number: int
    """The key as the small number that libcachesim wants."""
    size: int
    tokens: int
    """What generating it costs; 0 where the trace doesn't tell."""
    next_at: int
    """The position of the next request for the same key, or `NEVER`."""


class Result(NamedTuple):
    """What a replay missed, as shares of all requests and of all tokens."""

    requests: float
    tokens: float


Trace = list[Request]


def main() -> int:
    """Replay everything and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    options = parser.parse_args()
    traces = {name: trace for path in options.traces for name, trace in read(path)}
    print(f"{'trace':<26}{'footprint':>14}{'keys':>8}{'requests':>10}{'again':>7}")
    for name, trace in traces.items():
        keys = len({request.number for request in trace})
        again = 1 - keys / len(trace)
        print(f"{name:<26}{footprint(trace):>14,}{keys:>8,}{len(trace):>10,}{again:>7.1%}")
    columns = [*POLICIES, *REFERENCES, OPTIMUM]
    table: dict[tuple[str, float], dict[str, Result]] = {}
    started = time.monotonic()
    total = len(traces) * len(options.shares)
    for name, trace in traces.items():
        for share in options.shares:
            max_bytes = int(share * footprint(trace))
            row = table[name, share] = {}
            for column in columns:
                show = f"\r{len(table)}/{total} {name} at {share:.1%}: {column:<10}"
                print(f"{show} {time.monotonic() - started:4.0f} s", end="", file=sys.stderr)
                replay = replay_ours if column in POLICIES else replay_reference
                row[column] = replay(column, trace, max_bytes)
    print("\n", file=sys.stderr)
    print_requests(table)
    print_tokens({row: cells for row, cells in table.items() if has_tokens(traces[row[0]])})
    return 0


def read(path: Path) -> Iterator[tuple[str, Trace]]:
    """Yield the traces in a file, each with its name."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = [orjson.loads(line) for line in text.splitlines()]
        answers = [
            (str(line["hash_ids"]), answer_bytes(line["output_length"]), line["output_length"])
            for line in lines
        ]
        block_bytes = BLOCK_TOKENS * TOKEN_BYTES
        blocks = [(str(block), block_bytes, 0) for line in lines for block in line["hash_ids"]]
        yield f"{path.stem[:18]} answers", trace_of(answers)
        yield f"{path.stem[:18]} blocks", trace_of(blocks)
        return
    rows = list(csv.DictReader(text.splitlines()))
    if "lbn" in rows[0]:
        yield path.stem, trace_of([(row["lbn"], int(row["size"]), 0) for row in rows])
        return
    lengths = [(row["ContextTokens"], int(row["GeneratedTokens"])) for row in rows]
    yield (
        path.stem,
        trace_of([(f"{given},{made}", answer_bytes(made), made) for given, made in lengths]),
    )


def answer_bytes(tokens: int) -> int:
    """Return what an answer of so many tokens is taken for."""
    return ENVELOPE_BYTES + TOKEN_BYTES * tokens


def trace_of(requests: Sequence[tuple[str, int, int]]) -> Trace:
    """Make a trace of names, sizes and tokens."""
    numbers: dict[str, int] = {}
    keys: dict[str, str] = {}
    for name, _, _ in requests:
        numbers.setdefault(name, len(numbers) + 1)
        keys.setdefault(name, digest(name.encode()))
    trace: Trace = []
    next_at: dict[str, int] = {}
    for position in range(len(requests) - 1, -1, -1):
        name, size, tokens = requests[position]
        trace.append(Request(keys[name], numbers[name], size, tokens, next_at.get(name, NEVER)))
        next_at[name] = position
    return trace[::-1]


def footprint(trace: Trace) -> int:
    """Return the bytes of all different keys, each at its largest."""
    sizes: dict[int, int] = {}
    for request in trace:
        sizes[request.number] = max(request.size, sizes.get(request.number, 0))
    return sum(sizes.values())


def has_tokens(trace: Trace) -> bool:
    """Return whether the trace tells what its requests cost."""
    return any(request.tokens for request in trace)


def replay_ours(name: str, trace: Trace, max_bytes: int) -> Result:
    """Replay against one of our policies, as `MemoryCache` drives it."""
    policy = POLICIES[name](max_bytes)
    held: dict[str, int] = {}
    held_bytes = misses = missed_tokens = 0
    for key, _, size, tokens, _ in trace:
        if key in held:
            policy.access(key)
            continue
        misses += 1
        missed_tokens += tokens
        if size > max_bytes:
            continue
        policy.insert(key, size)
        held[key] = size
        held_bytes += size
        while held_bytes > max_bytes:
            held_bytes -= held.pop(policy.evict())
    return shares(trace, misses, missed_tokens)


def replay_reference(name: str, trace: Trace, max_bytes: int) -> Result:
    """Replay against one of libcachesim's policies."""
    cache = getattr(libcachesim, name)(cache_size=max_bytes, hashpower=16)
    asked = libcachesim.Request()
    misses = missed_tokens = 0
    for position, request in enumerate(trace):
        asked.obj_id = request.number
        asked.obj_size = request.size
        asked.clock_time = position
        asked.next_access_vtime = request.next_at
        if not cache.get(asked):
            misses += 1
            missed_tokens += request.tokens
    return shares(trace, misses, missed_tokens)


def shares(trace: Trace, misses: int, missed_tokens: int) -> Result:
    """Return misses as shares of the trace."""
    all_tokens = sum(request.tokens for request in trace)
    return Result(misses / len(trace), missed_tokens / all_tokens if all_tokens else 0.0)


def print_requests(table: dict[tuple[str, float], dict[str, Result]]) -> None:
    """Print miss ratios, and how far the default is from LRU and from the best reference."""
    print("Miss ratio: the share of requests that are not found")
    print_columns(table, "requests")
    to_lru, to_best = [], []
    print(f"\n{DEFAULT}, relative to            lru   best of libcachesim's online policies")
    for (name, share), row in table.items():
        ours = row[DEFAULT].requests
        best = min(REFERENCES, key=lambda column: row[column].requests)
        to_lru.append(ours / row["lru"].requests - 1)
        to_best.append(ours / row[best].requests - 1)
        print(f"{name:<26}{share:>6.1%}{to_lru[-1]:>+9.2%}{to_best[-1]:>+9.2%} ({best})")
    print(f"{'mean':<32}{statistics.mean(to_lru):>+9.2%}{statistics.mean(to_best):>+9.2%}")
    print(f"{'worst':<32}{max(to_lru):>+9.2%}{max(to_best):>+9.2%}\n")
    print("Mean distance of each policy to the best of libcachesim's online policies")
    for column in (*POLICIES, *REFERENCES):
        distances = [
            row[column].requests / min(row[each].requests for each in REFERENCES) - 1
            for row in table.values()
        ]
        print(f"  {column:<10}{statistics.mean(distances):>+8.2%}, worst {max(distances):+.2%}")


def print_tokens(table: dict[tuple[str, float], dict[str, Result]]) -> None:
    """Print what the misses cost, where traces tell."""
    if table:
        print("\nToken miss ratio: the share of output tokens that have to be generated")
        print_columns(table, "tokens")


def print_columns(table: dict[tuple[str, float], dict[str, Result]], field: str) -> None:
    """Print one figure of every replay: ours in small letters, libcachesim's as it names them."""
    columns = (*POLICIES, *REFERENCES, OPTIMUM)
    print(f"{'trace':<26}{'size':>6}" + "".join(f"{column:>9}" for column in columns))
    for (name, share), row in table.items():
        cells = "".join(f"{getattr(row[column], field):>9.4f}" for column in columns)
        print(f"{name:<26}{share:>6.1%}{cells}")


if __name__ == "__main__":
    sys.exit(main())
