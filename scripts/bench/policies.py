"""Miss ratios of our eviction policies on traces, beside libcachesim's.

Each trace is replayed against each policy at several cache sizes, given as shares of the trace's
footprint: the bytes of all different keys. Mooncake's traces are replayed twice: as whole requests,
and as prefix blocks, each a key. `server/simulation/traces.py` lists the formats.

A key keeps the size with which it was admitted. An entry that is larger than the cache is a miss,
and isn't admitted. Real traces of LLM requests rarely repeat whole requests, so read a trace's
share of repeated requests (`again`) first: no policy finds more than that.

Needs libcachesim (https://libcachesim.com), which has the policies to compare with.

Usage: policies.py TRACE... [--shares 0.001 0.01 0.1]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from server.simulation import references
from server.simulation.references import ONLINE, OPTIMUM
from server.simulation.traces import TOKEN_BYTES, Trace, TraceRequest, read
from tiers import digest
from tiers.policies import DEFAULT_POLICY, POLICIES


class Result(NamedTuple):
    """What a replay missed, as shares of all requests and of all tokens."""

    requests: float
    tokens: float


def main() -> int:
    """Replay everything and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    options = parser.parse_args()
    traces = {name: trace for path in options.traces for name, trace in replayed(path)}
    print(f"{'trace':<26}{'footprint':>14}{'keys':>8}{'requests':>10}{'again':>7}")
    for name, trace in traces.items():
        keys, requests = len(trace.sizes), len(trace.requests)
        again = 1 - keys / requests
        print(f"{name:<26}{trace.footprint_bytes:>14,}{keys:>8,}{requests:>10,}{again:>7.1%}")
    columns = [*POLICIES, *ONLINE, OPTIMUM]
    table: dict[tuple[str, float], dict[str, Result]] = {}
    started = time.monotonic()
    total = len(traces) * len(options.shares)
    for name, trace in traces.items():
        for share in options.shares:
            max_bytes = int(share * trace.footprint_bytes)
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


def replayed(path: Path) -> Iterator[tuple[str, Trace]]:
    """Yield the traces in a file, each with its name."""
    trace = read(path)
    blocks = [
        block
        for request in trace.requests
        if request.key in trace.prompts
        for block in trace.prompts[request.key].blocks
    ]
    if not blocks:
        yield trace.name, trace
        return
    yield f"{trace.name[:18]} answers", trace
    requests = [TraceRequest(str(block), trace.block_tokens * TOKEN_BYTES) for block in blocks]
    yield f"{trace.name[:18]} blocks", Trace(trace.name, requests)


def has_tokens(trace: Trace) -> bool:
    """Return whether the trace has the cost of its requests."""
    return any(request.tokens for request in trace.requests)


def replay_ours(policy_name: str, trace: Trace, max_bytes: int) -> Result:
    """Replay against one of our policies, as `MemoryCache` drives it."""
    policy = POLICIES[policy_name](max_bytes)
    held: dict[str, int] = {}
    held_bytes = misses = missed_tokens = 0
    keys = {name: digest(name.encode()) for name in trace.sizes}
    for name, size, _, tokens in trace.requests:
        key = keys[name]
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
    requests = [(request.key, request.size) for request in trace.requests]
    hits = references.replay(name, requests, max_bytes)
    missed = [r.tokens for r, hit in zip(trace.requests, hits, strict=True) if not hit]
    return shares(trace, len(missed), sum(missed))


def shares(trace: Trace, misses: int, missed_tokens: int) -> Result:
    """Return misses as shares of the trace."""
    all_tokens = sum(request.tokens for request in trace.requests)
    return Result(misses / len(trace.requests), missed_tokens / all_tokens if all_tokens else 0.0)


def print_requests(table: dict[tuple[str, float], dict[str, Result]]) -> None:
    """Print miss ratios, and how far the default is from LRU and from the best reference."""
    print("Miss ratio: the share of requests that are not found")
    print_columns(table, "requests")
    to_lru, to_best = [], []
    print(f"\n{DEFAULT_POLICY}, relative to            lru   best of libcachesim's online policies")
    for (name, share), row in table.items():
        ours = row[DEFAULT_POLICY].requests
        best = min(ONLINE, key=lambda column: row[column].requests)
        to_lru.append(ours / row["lru"].requests - 1)
        to_best.append(ours / row[best].requests - 1)
        print(f"{name:<26}{share:>6.1%}{to_lru[-1]:>+9.2%}{to_best[-1]:>+9.2%} ({best})")
    print(f"{'mean':<32}{statistics.mean(to_lru):>+9.2%}{statistics.mean(to_best):>+9.2%}")
    print(f"{'worst':<32}{max(to_lru):>+9.2%}{max(to_best):>+9.2%}\n")
    print("Mean distance of each policy to the best of libcachesim's online policies")
    for column in (*POLICIES, *ONLINE):
        distances = [
            row[column].requests / min(row[each].requests for each in ONLINE) - 1
            for row in table.values()
        ]
        print(f"  {column:<10}{statistics.mean(distances):>+8.2%}, worst {max(distances):+.2%}")


def print_tokens(table: dict[tuple[str, float], dict[str, Result]]) -> None:
    """Print what the misses cost, where traces have costs."""
    if table:
        print("\nToken miss ratio: the share of output tokens that have to be generated")
        print_columns(table, "tokens")


def print_columns(table: dict[tuple[str, float], dict[str, Result]], field: str) -> None:
    """Print one figure of every replay: ours in small letters, libcachesim's as it names them."""
    columns = (*POLICIES, *ONLINE, OPTIMUM)
    print(f"{'trace':<26}{'size':>6}" + "".join(f"{column:>9}" for column in columns))
    for (name, share), row in table.items():
        cells = "".join(f"{getattr(row[column], field):>9.4f}" for column in columns)
        print(f"{name:<26}{share:>6.1%}{cells}")


if __name__ == "__main__":
    sys.exit(main())
