"""What a client waits for: starts, misses and hits of the product with the real engine.

Runs `scripts/serve` twice over one disk tier of its own. The first run answers each question as a
miss and then from memory. The second is a restart without a memory tier, which would be refilled:
it answers from disk while the engine still loads. Prints the seconds from the start of
`scripts/serve` to the first hit and miss, and for each kind of answer the medians of the time to
the first token and of the total, streamed.

One client asks one question at a time, for exactly 64 tokens. The time of a miss is vLLM's: it
depends on the processor, the model and `dtype`. Usage: road.py [--questions N]
"""

import argparse
import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import orjson

ROOT = Path(__file__).parents[2]


class Answered(NamedTuple):
    """How long an answer took, to its first token and to its end."""

    first_s: float
    total_s: float


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=20)
    questions = [f"Tell me a story of {n} hens." for n in range(parser.parse_args().questions)]
    subprocess.run([ROOT / "scripts/setup"], check=True)
    with tempfile.TemporaryDirectory(prefix="tierserve-bench-") as folder:
        with _serving(Path(folder), memory="{}") as (process, port, _):
            _until_answered(process, port, "Are you there?")
            misses = [_ask(port, question, "fwd=miss") for question in questions]
            memory = [_ask(port, question, "detail=memory") for question in questions]
        with _serving(Path(folder), memory="null") as (process, port, started):
            _until_answered(process, port, questions[0])
            hit_s = time.monotonic() - started
            disk = [_ask(port, question, "detail=disk") for question in questions[1:]]
            _until_answered(process, port, "Are you back?")
            miss_s = time.monotonic() - started
    print(f"restart: {hit_s:.1f} s to the first disk hit, {miss_s:.1f} s to the first miss")
    print(f"{'':>10} {'first token':>12} {'total':>12}   (64 tokens, streamed, medians)")
    for name, answers in (("miss", misses), ("memory hit", memory), ("disk hit", disk)):
        first, total = (statistics.median(times) for times in zip(*answers, strict=True))
        print(f"{name:>10} {first * 1e3:>9.2f} ms {total * 1e3:>9.2f} ms")
    return 0


@contextmanager
def _serving(
    folder: Path, *, memory: str
) -> Iterator[tuple["subprocess.Popen[bytes]", int, float]]:
    """Run `scripts/serve`; gives its process, the port, and when it was started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "TIERSERVE__SERVER__PORT": str(port),
        "TIERSERVE__TIERS__DISK__PATH": str(folder / "disk"),
        "TIERSERVE__TIERS__MEMORY": memory,
    }
    started = time.monotonic()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([ROOT / "scripts/serve"], env=env, stderr=log)
    try:
        yield process, port, started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _until_answered(process: "subprocess.Popen[bytes]", port: int, question: str) -> None:
    while process.poll() is None:
        with suppress(OSError, ValueError):
            _ask(port, question, "tierserve")
            return
        time.sleep(0.05)
    raise ChildProcessError(f"the server ended with status {process.returncode}")


def _ask(port: int, question: str, expected: str) -> Answered:
    """Ask on a new connection.

    Raises:
        ValueError: the answer isn't the expected kind of answer.
    """
    body = orjson.dumps(
        {"messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True,
         "max_tokens": 64, "ignore_eos": True}
    )  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first_s = 0.0
    for line in response:
        if not first_s and b'"content":"' in line and b'"content":""' not in line:
            first_s = time.perf_counter() - started
    total_s = time.perf_counter() - started
    connection.close()
    status = response.headers.get("Cache-Status", "")
    if response.status != 200 or expected not in status or not first_s:
        raise ValueError(f"expected {expected}, not {response.status} {status}")
    return Answered(first_s, total_s)


if __name__ == "__main__":
    sys.exit(main())
