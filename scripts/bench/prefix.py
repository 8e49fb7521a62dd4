"""The first token of prompts that begin as earlier ones: computed, engine-hot, and from disk.

Runs vLLM with the embedded model three times over: with the prefix tier, alone, and with its own
ExampleConnector, which hits identical prompts only. All have equally many threads. One client sends
one request at a time; engines that are idle take no CPU, so the first two run side by side, and
their requests alternate. A prompt is random tokens: a beginning, and a question of 20 tokens that
was never asked before (for the ExampleConnector the same question again). Prints, for beginnings of
each length, the median seconds to the first token and the ratios; what storing costs the throughput
of cold prompts; and bytes per token. Needs about 8 GB of memory and `scripts/setup`.

Usage: prefix.py [--repeats N] [--dtype auto|bfloat16|float32]
"""

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rows import print_row
from servers import best_dtype, running_vllm

from tiers.prefix_kv.data_file import DATA
from tiers.prefix_kv.options import WARM, ConnectorOptions
from tiers.prefix_kv.store import PrefixStore, StoreConfig

LENGTHS = (512, 2000, 3800)
_QUESTION = 20
_LIMIT = 8 * 1024**3
_COLD_TOKENS = 1000
_BLOCK_TOKENS = 128
_COLD, _HOT, _DISK = "cold, vLLM alone", "engine-hot", "disk, restarted"


class Engine:
    """A vLLM server that runs.

    Args:
        port: its port.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        # The first steps of an engine take longer.
        self.ask(_tokens(900))

    def forget(self) -> None:
        """Empty the engine's own prefix cache, as if all of it had been evicted."""
        status, _ = self._send("POST", "/reset_prefix_cache")
        if status != 200:
            raise ChildProcessError("vLLM has no /reset_prefix_cache")

    def ask(self, prompt: list[int], cached: int | None = None, **fields: Any) -> float:
        """Return the seconds to the first token.

        Raises:
            ValueError: not at least `cached` tokens were reused, or any where that is 0.
        """
        body = {
            "model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip
        began = time.perf_counter()
        connection = self._connect("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        first_s, reused = 0.0, -1
        for line in response:
            if b'"choices":[{' in line and not first_s:
                first_s = time.perf_counter() - began
            if b'"cached_tokens":' in line:
                usage = json.loads(line.removeprefix(b"data: "))["usage"]
                reused = usage["prompt_tokens_details"]["cached_tokens"]
        connection.close()
        if response.status != 200 or not first_s:
            raise ValueError(f"status {response.status}")
        if cached is not None and (reused > 0 if cached == 0 else reused < cached):
            raise ValueError(f"{reused} tokens were reused, not {cached}")
        return first_s

    def _send(self, method: str, path: str) -> tuple[int, bytes]:
        connection = self._connect(method, path, None)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def _connect(self, method: str, path: str, body: str | None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default=best_dtype())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tierserve-bench-") as folder:
        _measure(Path(folder), given.repeats, given.dtype)
    return 0


class Measurement:
    """The seconds to the first token, by case and by the length of the beginning."""

    def __init__(self, repeats: int) -> None:
        self.beginnings = {length: [_tokens(length) for _ in range(repeats)] for length in LENGTHS}
        self.questions = {
            length: [prompt + _tokens(_QUESTION) for prompt in prompts]
            for length, prompts in self.beginnings.items()
        }
        self.seconds: dict[str, dict[int, list[float]]] = {}

    def note(self, case: str, length: int, seconds: float) -> None:
        """Note a measurement."""
        self.seconds.setdefault(case, {}).setdefault(length, []).append(seconds)

    def hits(self, case: str, engine: Engine, before: Callable[[], None] = lambda: None) -> None:
        """Ask a new question about each beginning, all of whose full blocks must be reused."""
        for length, prompts in self.beginnings.items():
            for prompt in prompts:
                before()
                full = length // _BLOCK_TOKENS * _BLOCK_TOKENS
                self.note(case, length, engine.ask(prompt + _tokens(_QUESTION), full))

    def same(self, case: str, engine: Engine) -> None:
        """Ask the same questions; one that fails counts as endless."""
        for length, prompts in self.questions.items():
            for prompt in prompts:
                try:
                    self.note(case, length, engine.ask(prompt))
                except (OSError, ValueError):
                    self.note(case, length, float("inf"))

    def cold(self, cases: Mapping[str, Engine]) -> None:
        """Ask about each beginning for the first time, at each engine in turn."""
        for length, prompts in self.beginnings.items():
            for prompt in prompts:
                for case, engine in cases.items():
                    self.note(case, length, engine.ask(prompt + _tokens(_QUESTION), 0))


def _measure(folder: Path, repeats: int, dtype: str) -> None:
    store, measured = folder / "prefix", Measurement(repeats)
    ours = ConnectorOptions(str(store), _LIMIT, "m", "embedded", store_after=1).engine_options()
    theirs = _example_options(folder / "example")
    with (
        _running("alone", folder, {}, dtype) as alone,
        _running("tiered", folder, ours, dtype) as tiered,
    ):
        measured.cold({_COLD: alone, "cold, stored": tiered})
        measured.hits("engine-hot, vLLM alone", alone)
        measured.hits(_HOT, tiered)
        measured.hits("disk, evicted", tiered, tiered.forget)
        _print_cost(tiered, repeats)

    def forget_and_drop() -> None:
        tiered.forget()
        _drop(store)

    with _running("tiered", folder, ours, dtype) as tiered:
        measured.hits(_DISK, tiered)
        measured.hits("disk, not in the page cache", tiered, forget_and_drop)
    _print_bytes(store)
    with _running("example", folder, theirs, dtype) as example:
        measured.same("cold, stored by ExampleConnector", example)
    with _running("example", folder, theirs, dtype) as example:
        measured.same("ExampleConnector restarted, same question", example)
    _print(measured.seconds)


@contextmanager
def _running(name: str, folder: Path, options: Mapping[str, Any], dtype: str) -> Iterator[Engine]:
    place = folder / name
    place.mkdir(exist_ok=True)
    with running_vllm(place, options, dtype=dtype) as port:
        yield Engine(port)
        # What was stored last is on its way.
        time.sleep(3)


def _example_options(folder: Path) -> dict[str, Any]:
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return {"kv_transfer_config": transfer}


def _print_cost(engine: Engine, repeats: int) -> None:
    """Print what storing costs cold prompts, by pairs at one engine that alternate in order.

    Of a request that only warms the engine's cache, nothing is stored.
    """
    ratios = []
    for number in range(4 * repeats):
        order: list[dict[str, Any]] = [{}, {"kv_transfer_params": WARM}]
        stored, not_stored = 0.0, 0.0
        for fields in order[:: 1 if number % 2 else -1]:
            seconds = engine.ask(_tokens(_COLD_TOKENS), 0, **fields)
            stored, not_stored = (stored, seconds) if fields else (seconds, not_stored)
        ratios.append(stored / not_stored)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"cold prompts of {_COLD_TOKENS} tokens, stored / not stored by one engine:", end=" ")
    print(f"median {median:.3f} of {len(ratios)} pairs, quartiles {low:.3f} and {high:.3f}")


def _print_bytes(folder: Path) -> None:
    store = PrefixStore(StoreConfig(folder, _LIMIT))
    found = store.statistics()
    store.close()
    tokens = found.blocks * _BLOCK_TOKENS
    print(f"{found.file_bytes / tokens:,.0f} bytes per token, of {found.blocks} blocks")


def _print(results: Mapping[str, Mapping[int, list[float]]]) -> None:
    print(f"{'seconds to the first token':>42}" + "".join(f"{n:>18}" for n in LENGTHS))
    for case, by_length in results.items():
        cells = []
        for length in LENGTHS:
            median = statistics.median(by_length[length])
            cold = statistics.median(results[_COLD][length])
            cells.append(f"{median:>10.3f} {cold / median:>6.1f}x")
        print(f"{case:>42}" + "".join(cells))
    hot, disk = results[_HOT], results[_DISK]
    for length in LENGTHS:
        ratio = statistics.median(disk[length]) / statistics.median(hot[length])
        print(f"{length} tokens: from disk after a restart / engine-hot {ratio:.2f}")
    length = LENGTHS[1]
    what = f"first token of {length:,} tokens read before, another question: computed, engine-hot, "
    cases = [statistics.median(results[case][length]) for case in (_COLD, _HOT, _DISK)]
    print_row(f"{what}from disk after a restart", ", ".join(f"{each:.2f} s" for each in cases))


def _drop(folder: Path) -> None:
    """Have the system forget the blocks' file, so that it is read from the disk."""
    file = os.open(folder / DATA, os.O_RDONLY)
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def _tokens(number: int) -> list[int]:
    return random.choices(range(100, 40_000), k=number)  # noqa: S311


if __name__ == "__main__":
    sys.exit(main())
