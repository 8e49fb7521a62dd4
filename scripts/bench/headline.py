"""What the tiers give: search with whole requests that repeat, and chats whose beginnings do.

`search`: `tierserve bench` asks vLLM with the embedded model, and then the same vLLM through
tierserve, whose tiers are warm: nine of ten queries came before. An answer has 40 tokens and takes
about two seconds. One user asks at a time, and then eight. Then one user's queries are all new:
what tierserve costs where it gives nothing.

`conversation`: chats of several turns hardly repeat as whole requests, so answers aren't found. But
each turn begins as the one before. The engine's own cache is small, as that of a busy engine is to
each of its users, and the prefix tier below it is off, and then on.

Needs `scripts/setup bench` and the embedded model. Usage: headline.py [search]
[conversation] [--seconds N]
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rows import print_row
from servers import MODEL, best_dtype, loaded, running_tierserve, running_vllm

SEARCH = "search:prompts=40"
NEW = "search:unique=1"
CHATS = "conversation:think=8"
_SEARCHERS = (1, 8)
_CHATTERS = 6
_CHAT_TOKENS = 8
"""Of an answer, so that reading prompts is most of the work."""
_ENGINE_BLOCKS = 16
"""Of 128 tokens: less than the users' chats have together."""
_HEAD = ("requests/s", "hits", "first token, p50", "mean", "p50", "p99")


def main() -> int:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = {"search": _search, "conversation": _conversation}
    parser.add_argument("parts", nargs="*", metavar="PART", help=" or ".join(parts))
    parser.add_argument("--seconds", type=int, default=120, help="of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tierserve-bench-") as folder:
        for name in options.parts or parts:
            parts[name](Path(folder), options.seconds)
    return 0


def _search(folder: Path, seconds: int) -> None:
    fields = {"disk": {"path": str(folder / "disk"), "max_bytes": "1GiB"}}
    with running_vllm(folder) as engine:
        upstream = f"http://127.0.0.1:{engine}"
        config = {"models": {MODEL: {"upstreams": [upstream], "vllm": {}}}, "tiers": fields}
        with running_tierserve(folder, config, needs_engine=True) as (_, port):
            sides = {"vLLM alone": upstream, "through tierserve": f"http://127.0.0.1:{port}"}
            runs = {}
            for workload in (SEARCH, NEW):
                for users in _SEARCHERS if workload == SEARCH else _SEARCHERS[:1]:
                    for name, url in sides.items():
                        run = f"{users} user{'s' * (users > 1)}, {name}"
                        run = run if workload == SEARCH else f"all new, {run}"
                        runs[run] = _bench(url, workload, users, seconds)
    _print_table("search: nine of ten queries came before", runs)
    alone, through = (runs[f"1 user, {name}"] for name in sides)
    print_row("an answer of 40 tokens, mean, 90% hits: vLLM alone, through tierserve",
              f"{_mean(alone)}, {_mean(through)}")  # fmt: skip


def _conversation(folder: Path, seconds: int) -> None:
    args = {
        "max_model_len": (_ENGINE_BLOCKS - 1) * 128, "num_gpu_blocks_override": _ENGINE_BLOCKS,
        "block_size": 128, "enforce_eager": True, "enable_prompt_tokens_details": True,
        "dtype": best_dtype(),
    }  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    models = {MODEL: {"source": "embedded", "engine": {"args": args, "env": env}}}
    runs = {}
    for name in ("off", "on"):
        place = folder / name
        place.mkdir()
        tiers: dict[str, Any] = {"disk": {"path": str(place / "disk"), "max_bytes": "1GiB"}}
        if name == "on":
            tiers["prefix"] = {"path": str(place / "prefix"), "max_bytes": "8GiB"}
        config = {"models": models, "tiers": tiers}
        with running_tierserve(place, config, needs_engine=True) as (_, port):
            url = f"http://127.0.0.1:{port}"
            runs[f"prefix tier {name}"] = _bench(url, CHATS, _CHATTERS, seconds)
    _print_table("conversation: whole requests hardly repeat", runs)
    first = ", ".join(_time(run["whole"]["ttft_s"], "p50") for run in runs.values())
    print_row("first token of a chat's turn: prefix tier off, on", first)


def _bench(url: str, workload: str, users: int, seconds: int) -> dict[str, Any]:
    """Run `tierserve bench`, with a warm cache where queries repeat; returns its result."""
    options = ["--max-tokens", str(_CHAT_TOKENS)] if workload == CHATS else []
    cache = "warm" if workload == SEARCH else "cold"
    return loaded(url, workload, users, seconds, *options, cache=cache)


def _print_table(title: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n| {title} | {' | '.join(_HEAD)} |")
    print("|---" * (len(_HEAD) + 1) + "|")
    for name, run in runs.items():
        whole = run["whole"]
        end = whole["e2e_s"]
        cells = (
            f"{whole['requests_per_s']:.2f}", f"{run['hit_ratio']['requests'] or 0:.0%}",
            _time(whole["ttft_s"], "p50"), _time(end, "mean"),
            _time(end, "p50"), _time(end, "p99"),
        )  # fmt: skip
        print(f"| {name}{'' if run['valid'] else ' (not valid)'} | {' | '.join(cells)} |")


def _mean(run: Mapping[str, Any]) -> str:
    return _time(run["whole"]["e2e_s"], "mean")


def _time(spread: Mapping[str, Any] | None, name: str) -> str:
    if spread is None:
        return "-"
    seconds = float(spread[name])
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
