"""How well the simulator predicts: a trace's prompts through a real engine with the prefix tier.

Makes a prompt of each request of a trace with prompts: 128 seeded tokens for each of its first
blocks, so that prompts begin alike as far as those of the trace do, and 8 tokens of its own. The
engine, a vLLM with the embedded model, small caches and one token of output, gets them one after
the other. Prints which part of all tokens of prompts it took from its own cache and from disk, by
its answers (`cached_tokens`, and `prefix_disk_tokens` of the tier), and what the simulation of the
same prompts says. Only the times of the requests and the size of a block come from the engine.

Usage: prefix_replay.py TRACE [--requests N] [--blocks N] [--engine-blocks N] [--prefix SIZE]
"""

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from pydantic import ByteSize, TypeAdapter
from rows import print_row
from servers import MODEL, running_vllm

from server.simulation.engine_cache import EngineCache
from server.simulation.prefix_tier import PrefixModel, replay_tier
from server.simulation.simulate import no_progress
from server.simulation.traces import Trace, TracePrompt, read
from tiers.prefix_kv.options import DISK_TOKENS, ConnectorOptions
from tiers.prefix_kv.store import PrefixStore, StoreConfig

BLOCK_TOKENS, OWN_TOKENS = 128, 8
_TOKEN_IDS = range(1000, 40_000)
_ASK_S = 300


class Answered(NamedTuple):
    """What an engine says of a prompt."""

    at_s: float
    tokens: int
    cached: int
    loaded: int
    """Those of them that came from disk."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """Parts of all tokens of prompts."""

    engine: float
    """From the engine's own cache."""
    disk: float
    """From the prefix tier."""

    @property
    def both(self) -> float:
        """From either."""
        return self.engine + self.disk


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=60, help="of the trace, the first")
    parser.add_argument("--blocks", type=int, default=6, help="the most of a prompt")
    parser.add_argument("--engine-blocks", type=int, default=30, help="of the engine's own cache")
    parser.add_argument("--prefix", default="128MiB", help="limit of the prefix tier")
    parser.add_argument("--store-after", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prompts = scaled(read(options.trace), options.requests, options.blocks)
    with tempfile.TemporaryDirectory(prefix="tierserve-replay-") as folder:
        max_bytes = int(TypeAdapter(ByteSize).validate_python(options.prefix))
        tier = ConnectorOptions(
            str(Path(folder) / "prefix"), max_bytes, MODEL, weights="of the replay",
            store_after=options.store_after,
        )  # fmt: skip
        with running_vllm(Path(folder), _options(tier, options.engine_blocks)) as port:
            answers = [_ask(port, tokens_of(each, at)) for at, each in enumerate(prompts)]
        measured, block_bytes = _measured(tier, answers)
    timed = [each._replace(at_s=answer.at_s) for each, answer in zip(prompts, answers, strict=True)]
    predicted = predict(timed, tier, options.engine_blocks, block_bytes)
    if options.json:
        print(json.dumps({"measured": asdict(measured), "predicted": asdict(predicted)}))
        return 0
    print(f"{len(prompts)} prompts, {sum(answer.tokens for answer in answers):,} tokens")
    print(f"{'':>12} {'engine':>8} {'disk':>8} {'both':>8}")
    for name, reuse in (("measured", measured), ("predicted", predicted)):
        print(f"{name:>12} {reuse.engine:>8.2%} {reuse.disk:>8.2%} {reuse.both:>8.2%}")
    points = abs(measured.both - predicted.both) * 100
    print(f"{'difference':>12} {points:.2f} points of both")
    print_row("reused tokens of a trace's prompts: simulated beside a real engine",
              f"{points:.1f} points apart")  # fmt: skip
    return 0


def scaled(trace: Trace, requests: int, blocks: int) -> list[TracePrompt]:
    """Return the first requests' prompts, cut to so many blocks, for a token of output each."""
    found = [trace.prompts[request.key] for request in trace.requests[:requests]]
    cut = [each.blocks[:blocks] for each in found]
    return [TracePrompt(len(each) * BLOCK_TOKENS + OWN_TOKENS, each, 1) for each in cut]


def tokens_of(prompt: TracePrompt, number: int) -> list[int]:
    """Return the token ids of a prompt; those after its blocks are the number's own."""
    tokens: list[int] = []
    for block in prompt.blocks:
        tokens += Random(block).choices(_TOKEN_IDS, k=BLOCK_TOKENS)  # noqa: S311
    return tokens + Random(-1 - number).choices(_TOKEN_IDS, k=OWN_TOKENS)  # noqa: S311


def predict(
    prompts: Sequence[TracePrompt], tier: ConnectorOptions, engine_blocks: int, block_bytes: int
) -> Reuse:
    """Return what the simulation says of the prompts."""
    # vLLM keeps a block for itself.
    cache = EngineCache(engine_blocks - 1, BLOCK_TOKENS)
    requests = [(each, cache.ask(each)) for each in prompts]
    model = PrefixModel(
        BLOCK_TOKENS, block_bytes // BLOCK_TOKENS, compute_tokens_per_s=200,
        load_tokens_per_s=20_000, store_after=tier.store_after, min_tokens=tier.min_tokens,
        ttl_s=tier.ttl_s,
    )  # fmt: skip
    run = replay_tier(requests, model, tier.max_bytes, no_progress)
    whole = sum(each.tokens for each in prompts)
    hits = sum(computed for _, computed in requests)
    return Reuse(hits * BLOCK_TOKENS / whole, sum(run.loaded) * BLOCK_TOKENS / whole)


def _measured(tier: ConnectorOptions, answers: Sequence[Answered]) -> tuple[Reuse, int]:
    """Return what the engine reused, and the size of a block."""
    store = PrefixStore(StoreConfig(Path(tier.folder), tier.max_bytes))
    try:
        block_bytes = max((block.size for block in store.index.blocks()), default=0)
    finally:
        store.close()
    if not block_bytes:
        raise ValueError("the engine has stored nothing; its log says why")
    whole = sum(answer.tokens for answer in answers)
    cached = sum(answer.cached for answer in answers)
    loaded = sum(answer.loaded for answer in answers)
    return Reuse((cached - loaded) / whole, loaded / whole), block_bytes


def _options(tier: ConnectorOptions, engine_blocks: int) -> dict[str, Any]:
    """Return the engine's options: small caches, and one request at a time."""
    return {
        "block_size": BLOCK_TOKENS, "num_gpu_blocks_override": engine_blocks, "max_num_seqs": 1,
        "max_model_len": (engine_blocks - 1) * BLOCK_TOKENS, **tier.engine_options(),
    }  # fmt: skip


def _ask(port: int, tokens: list[int]) -> Answered:
    body = {"model": MODEL, "prompt": tokens, "max_tokens": 1, "temperature": 0}
    at_s = time.monotonic()
    status, answer = _send(port, "POST", "/v1/completions", json.dumps(body).encode())
    if status != HTTPStatus.OK:
        raise ValueError(f"expected an answer, not {status} {answer[:1000]!r}")
    told = json.loads(answer)
    usage = told["usage"]
    details = usage.get("prompt_tokens_details") or {}
    loaded = (told.get("kv_transfer_params") or {}).get(DISK_TOKENS, 0)
    return Answered(at_s, usage["prompt_tokens"], details.get("cached_tokens") or 0, loaded)


def _send(port: int, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
