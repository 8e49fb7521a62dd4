"""Routing by prefix beside turns: two vLLM servers with the embedded model behind tierserve.

Chats of several turns, none of which repeats as a whole: each turn begins as the one before it. The
two engines' own caches together hold what all users' chats have, but not twice, as where engines
are busy. Two servers of tierserve stand before the same engines, one with `routing: prefix` and one
with `routing: round_robin`; `tierserve bench` asks one after the other, round by round, and the
engines forget all in between. Prints the share of prompts' tokens that engines had not to compute,
and the seconds to the first token.

Needs `scripts/setup bench`, the embedded model, two CPUs and about 6 GB of memory. Usage:
routing.py [--rounds N] [--seconds N]
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from rows import print_row
from servers import MODEL, loaded, running_tierserve, running_vllm

ROUTINGS = ("round_robin", "prefix")
_CHATS = "conversation:think=12,turns=6,system=200,user=40,assistant=120,repeat=0"
_WARM = "conversation:turns=1,repeat=0"
_USERS = 12
_TOKENS = 4
"""Of an answer, so that reading prompts is most of the work."""
_BLOCKS = 48
"""Of 128 tokens each engine has; a chat has up to 9 of them."""


class Run(NamedTuple):
    """What one run of `tierserve bench` found."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    first_token_mean_s: float
    first_token_p50_s: float
    is_valid: bool


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=40, help="in which chats begin")
    options = parser.parse_args()
    args = {
        "max_model_len": (_BLOCKS - 1) * 128, "num_gpu_blocks_override": _BLOCKS,
        "block_size": 128,
    }  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierserve-bench-")))
        engines = []
        for cpu in range(2):
            own = folder / f"engine-{cpu}"
            own.mkdir()
            engines.append(stack.enter_context(running_vllm(own, args, cpu=cpu)))
        fronts = {}
        for routing in ROUTINGS:
            own = folder / routing
            own.mkdir()
            upstreams = [f"http://127.0.0.1:{port}" for port in engines]
            model = {"upstreams": upstreams, "vllm": {}, "routing": routing}
            config = {"models": {MODEL: model}, "tiers": {"memory": {"max_bytes": "64MiB"}}}
            _, port = stack.enter_context(running_tierserve(own, config, needs_engine=True))
            fronts[routing] = f"http://127.0.0.1:{port}"
        # The first steps of an engine take longer.
        _bench(fronts["round_robin"], _WARM, 10, seed=0)
        runs: dict[str, list[Run]] = {routing: [] for routing in ROUTINGS}
        for number in range(options.rounds):
            # Whoever is first in one round is last in the next.
            for routing in ROUTINGS[:: 1 - number % 2 * 2]:
                for engine in engines:
                    _forget(engine)
                runs[routing].append(
                    _bench(fronts[routing], _CHATS, options.seconds, seed=number + 1)
                )
    _print_table(runs)
    return 0


def _forget(port: int) -> None:
    """Empty an engine's own prefix cache."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/reset_prefix_cache")
    if connection.getresponse().status != 200:
        raise ChildProcessError("vLLM has no /reset_prefix_cache")


def _bench(url: str, workload: str, seconds: int, *, seed: int) -> Run:
    """Run `tierserve bench`."""
    options = ("--max-tokens", str(_TOKENS), "--seed", str(seed))
    result = loaded(url, workload, _USERS, seconds, *options)
    whole = result["whole"]
    first = whole["ttft_s"]
    return Run(
        whole["requests"], whole["prompt_tokens"], whole["cached_tokens"],
        first["mean"], first["p50"], result["valid"],
    )  # fmt: skip


def _print_table(runs: dict[str, list[Run]]) -> None:
    print("\n| routing, round | requests | tokens found | first token, mean | p50 |")
    print("|---|---|---|---|---|")
    for routing, each_round in runs.items():
        for number, run in enumerate(each_round, 1):
            print(
                f"| {routing}, {number}{'' if run.is_valid else ' (not valid)'} | {run.requests}"
                f" | {_found([run]):.0%} | {run.first_token_mean_s:.2f} s"
                f" | {run.first_token_p50_s:.2f} s |"
            )
    turns, prefix = (runs[routing] for routing in ROUTINGS)
    ratio = _mean_s(turns) / _mean_s(prefix)
    print_row(
        f"{_USERS} chats on two engines, round robin, by prefix: tokens found; first token, mean",
        f"{_found(turns):.0%}, {_found(prefix):.0%};"
        f" {_mean_s(turns):.2f} s, {_mean_s(prefix):.2f} s ({ratio:.2f} times)",
    )


def _found(runs: Sequence[Run]) -> float:
    """Return which share of prompts' tokens engines had in their caches."""
    return sum(run.cached_tokens for run in runs) / sum(run.prompt_tokens for run in runs)


def _mean_s(runs: Sequence[Run]) -> float:
    """Return the mean time to the first token, of all requests."""
    total = sum(run.first_token_mean_s * run.requests for run in runs)
    return total / sum(run.requests for run in runs)


if __name__ == "__main__":
    sys.exit(main())
