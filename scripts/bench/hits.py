"""Hits of the whole product beside a bare aiohttp handler, nginx and LiteLLM: requests a second.

The servers of a case run side by side, pinned to one core: the product answering from its memory
tier, the product answering from its disk tier (it has no other), an aiohttp handler with uvloop
that reads the same bodies and returns the same bytes, and nginx with `proxy_cache`, whose key is
the body (at most 64 kB: a cache file has no room for more) and whose files are in memory. wrk,
pinned to another core, asks them in turn, so that other work of the machine slows all alike.

A rate is the median of the rounds' responses a second, and beside it stands the server's CPU time
for one. A ratio is of responses in a second of CPU time, the median of the rounds' with its
quartiles. On a core that has nothing else to do that is the ratio of the rates. A rate with a *
isn't the server's, which used less than 0.9 of its core: it had one connection, or wrk, other work
or TCP held it up (an answer above 64 kB is more than a segment of loopback, and wrk slow to say
that it has read the first).

The product is complete: one tenant's key, metrics and request ids; the handler and nginx have none
of these. `log` adds its access log, in a file. Answers are asked for in the encoding in which they
are stored; a hit in the other one is converted, which takes about 2 ms for 500 tokens more. Streams
have an event a word.

`workers` compares the rates of two workers of the product, on two cores, and of one. On a machine
with two cores wrk shares these: a column gives its time to the workers. The last has what they
would reach without idling, which other work of the machine doesn't change.

LiteLLM's proxy, with its in-memory and its disk cache, is installed the first time, in an
environment of its own in the cache folder.

Needs two cores and wrk, and nginx for its column. The tables are Markdown.

Usage: hits.py [--cases NAME …] [--litellm] [--rounds N] [--seconds N]
"""

import argparse
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

from cached_servers import (
    KEY,
    LITELLM,
    RunningServer,
    check,
    fill,
    litellm,
    nginx,
    replying,
    tierserve,
)
from hit_cases import CASES, Case, answer, questions
from rows import print_row
from wrk import Load, LoadResult

NGINX_KEY_BYTES = 65_000
"""The head of a cache file has the key, and at most 64 kB (`ngx_http_file_cache_header_t`)."""
WORKERS = "workers"


@dataclass(frozen=True)
class Sample:
    """What one server did in one round."""

    load: LoadResult
    cores: float
    """Cores that the server used, on average."""

    @property
    def cpu_us(self) -> float:
        """CPU time of the server for each response (µs)."""
        return self.cores * 1e6 / self.load.rate


Side = Callable[[Path, int], AbstractContextManager[RunningServer]]
"""Runs a server, given a folder to make for it and the port of its upstream."""
Measure = Callable[[Case, Mapping[str, Side]], Mapping[str, Sequence[Sample]]]
"""Returns each server's samples, one a round."""


def main() -> int:
    """Measure the cases and print the tables."""
    names = [*CASES, WORKERS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}; by default all")  # fmt: skip
    parser.add_argument("--litellm", action="store_true", help="beside LiteLLM, too")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--seconds", type=int, default=3, help="of each server in a round")
    options = parser.parse_args()
    if shutil.which("wrk") is None or (os.cpu_count() or 1) < 2:
        print("hits.py needs wrk (apt install wrk) and two cores", file=sys.stderr)
        return 2
    if shutil.which("nginx") is None:
        print("nginx is left out: it isn't installed (apt install nginx)", file=sys.stderr)
    print(f"{_conditions()}; {options.rounds} rounds of {options.seconds} s", flush=True)
    measured = partial(_measure, rounds=options.rounds, seconds=options.seconds)
    cases = [CASES[name] for name in options.cases if name in CASES]
    if cases:
        _print_hits(cases, measured)
    if WORKERS in options.cases:
        _print_workers(measured)
    if options.litellm:
        _print_litellm(measured)
    return 0


def _measure(
    case: Case, sides: Mapping[str, Side], rounds: int, seconds: int
) -> Mapping[str, Sequence[Sample]]:
    """Fill and check the servers, then ask them in turn."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        expected = answer(case)
        (folder / "answer").write_bytes(expected)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        load = Load(folder, questions(case), headers, len(expected), new_heads=case.new_heads)
        servers = {}
        with replying(folder / "answer", case.content_type) as upstream:
            for name, side in sides.items():
                servers[name] = stack.enter_context(side(folder / name, upstream.port))
                fill(servers[name], load)
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        for server in servers.values():
            check(server, load, expected)
            _sample(server, load, 1, case.connections)
        for _ in range(rounds):
            for name, server in servers.items():
                samples[name].append(_sample(server, load, seconds, case.connections))
    return samples


def _sample(server: RunningServer, load: Load, seconds: int, connections: int) -> Sample:
    before = server.cpu_s()
    result = load.run(server.url, server.load_cores, seconds, connections)
    return Sample(result, (server.cpu_s() - before) / result.seconds)


def _bare(case: Case) -> Side:
    return lambda folder, _: replying(folder.with_name("answer"), case.content_type)


def _print_hits(cases: Sequence[Case], measured: Measure) -> None:
    """Print the product's hits beside the bare handler's answers and nginx's hits."""
    rates = ("bare", "nginx", "memory", "disk")
    ratios = (("memory", "bare"), ("disk", "bare"), ("memory", "nginx"))
    _print_head("case", *(f"{name}/s" for name in rates), *(f"{a} / {b}" for a, b in ratios))
    told = {}
    for case in cases:
        sides: dict[str, Side] = {"bare": _bare(case)}
        if shutil.which("nginx") and case.question_bytes < NGINX_KEY_BYTES:
            sides["nginx"] = nginx
        for name in ("memory", "disk"):
            sides[name] = partial(tierserve, memory=name == "memory", fields=case.fields)
        samples = measured(case, sides)
        _print_row(
            case.what,
            *(_rate(samples[name]) if name in samples else "" for name in rates),
            *(_ratio(samples[a], samples[b]) if b in samples else "" for a, b in ratios),
        )
        told[case.what] = "; ".join(_beside(samples, name) for name in ("memory", "disk"))
    what = "hits a second, of a bare aiohttp handler's (of nginx's `proxy_cache`): memory; disk"
    for case in cases:
        if case.is_told:
            print_row(f"{what}; {case.what}", told[case.what])


def _beside(samples: Mapping[str, Sequence[Sample]], name: str) -> str:
    """Return the medians of the ratios to the bare handler and, in parentheses, to nginx."""
    bare, *others = (
        f"{statistics.median(_ratios(samples[name], samples[to])):.1f}"
        for to in ("bare", "nginx")
        if to in samples
    )
    return f"{bare} ({others[0]})" if others else bare


def _print_workers(measured: Measure) -> None:
    """Print what two workers of the product answer, beside one."""
    print("\nTwo workers on two cores, one on one; 128 connections.\n")
    _print_head("hits of", "one/s", "two/s", "two / one", "with wrk's time", "by CPU time")
    case = Case(what="workers", connections=128)
    for tier in ("memory", "disk"):
        run = partial(tierserve, memory=tier == "memory")
        sides: dict[str, Side] = {
            "one": partial(run, fields={"server": {"workers": 1}}),
            "two": partial(run, fields={"server": {"workers": 2}}, cores=(0, 1)),
        }
        one, two = measured(case, sides).values()
        # What wrk left of two cores, as a part.
        left = [1 - sample.load.cores / 2 if os.cpu_count() == 2 else 1 for sample in two]
        raw = [b.load.rate / a.load.rate for a, b in zip(one, two, strict=True)]
        fair = [ratio / part for ratio, part in zip(raw, left, strict=True)]
        by_cpu = [2 * a.cpu_us / b.cpu_us for a, b in zip(one, two, strict=True)]
        _print_row(tier, _rate(one), _rate(two), *map(_quartiles, (raw, fair, by_cpu)))


def _print_litellm(measured: Measure) -> None:
    """Print the product's hits beside those of LiteLLM."""
    print(f"\nBeside {' and '.join(LITELLM)}.\n")
    _print_head("hits of", "LiteLLM/s", "tierserve/s", "tierserve / LiteLLM")
    # LiteLLM's in-memory cache holds 200 answers; no field of its configuration changes that.
    case = Case(what="LiteLLM", questions=100)
    for tier, cache in (("memory", "local"), ("disk", "disk")):
        ours = partial(tierserve, memory=tier == "memory", fields={})
        theirs, hits = measured(
            case, {"litellm": partial(litellm, cache=cache), tier: ours}
        ).values()
        _print_row(tier, _rate(theirs), _rate(hits), _ratio(hits, theirs))


def _print_head(*names: str) -> None:
    _print_row(*names)
    _print_row("---", *["--:"] * (len(names) - 1))


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _rate(samples: Sequence[Sample]) -> str:
    """Return the medians of responses a second, and of the server's CPU time for each."""
    rate, cpu_us = _median(samples, "load.rate"), _median(samples, "cpu_us")
    return f"{rate:,.0f}{'*' * (_median(samples, 'cores') < 0.9)} ({cpu_us:,.0f} µs)"


def _median(samples: Sequence[Sample], of: str) -> float:
    return float(statistics.median(map(attrgetter(of), samples)))


def _ratio(samples: Sequence[Sample], to: Sequence[Sample]) -> str:
    return _quartiles(_ratios(samples, to))


def _ratios(samples: Sequence[Sample], to: Sequence[Sample]) -> list[float]:
    return [b.cpu_us / a.cpu_us for a, b in zip(samples, to, strict=True)]


def _quartiles(ratios: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _conditions() -> str:
    """Return what the figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    programs = [
        " ".join(re.findall(r"(nginx|wrk)\W+(?:debian/)?([\d.]+)", _output(command))[0])
        for command in (["nginx", "-v"], ["wrk", "-v"])
        if shutil.which(command[0])
    ]
    packages = [f"{name} {version(name)}" for name in ("aiohttp", "uvloop", "lmdb")]
    python = f"Python {platform.python_version()}"
    cpu = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    return ", ".join([cpu, f"Linux {platform.release()}", python, *packages, *programs])


def _output(command: Sequence[str]) -> str:
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    return ran.stdout + ran.stderr


if __name__ == "__main__":
    sys.exit(main())
