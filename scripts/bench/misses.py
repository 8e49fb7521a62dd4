"""Hits beside misses, and misses beside vLLM's own server.

A server with both tiers stands before an upstream. One client asks for the same memory hit again
and again, a millisecond apart: alone, while wrk's connections ask for bodies that no tier holds,
and while they ask for such streams. The three alternate. Every miss is generated, stored and
committed. The upstream is `stand_in.py`, which takes little of the processor. It gives bodies at
once, so that the server is always busy, and streams in steps, as an engine does. Where the machine
has several cores the server has one of its own.

How to read it: `ratio` is the p50 beside misses to the p50 alone. `loop without a core` is the
share of the time in which the server's event loop was ready to run and had no core: a latency that
grows with it is the machine's, not the server's.

`--engine` puts vLLM with the embedded model in the stand-in's place, for streams alone, and adds a
second table: how long clients wait for a miss through the server and from the same vLLM directly,
one client and eight, whose requests alternate. Its ratios should be 1.0. All share all cores then,
since vLLM wants two. It needs the embedded model, which `scripts/serve` prepares.

Needs wrk. Usage: misses.py [--seconds N] [--rounds N] [--clients N] [--answer-bytes N] [--engine]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

from miss_times import ROUTE, print_miss_times
from rows import print_row
from servers import free_port, running, running_tierserve, running_vllm

LOAD = """
local asked = 0
wrk.headers["Content-Type"] = "application/json"
request = function()
  asked = asked + 1
  return wrk.format("POST", "%s", nil, '{"model":"m","temperature":0,"max_tokens":32,'
    .. '"stream":%s,"messages":[{"role":"user","content":"' .. os.time() .. " " .. asked .. '"}]}')
end
"""
QUESTION = (
    b'{"model":"m","temperature":0,"max_tokens":32,"messages":[{"role":"user","content":"again"}]}'
)
ALONE, BODIES, STREAMS = "alone", "bodies", "streams"
# Beside the client that measures, which must not wait for them.
LOAD_NICE = 5


class Case:
    """A hit beside something.

    Args:
        beside: names it.
    """

    def __init__(self, beside: str) -> None:
        self.beside = beside
        self.took_s: list[float] = []
        self.seconds = self.waited_s = 0.0
        self.misses = 0

    def quantile(self, part: float) -> float:
        """Return a quantile of the latencies in ms."""
        took = sorted(self.took_s)
        return took[min(int(len(took) * part), len(took) - 1)] * 1e3


class Server:
    """A tierserve with both tiers, and what measures it.

    Args:
        process: its process.
        port: its port.
        folder: for the scripts of wrk.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
        self._pid, self._folder = process.pid, folder
        self._address = f"http://127.0.0.1:{port}"
        self._client = HTTPConnection("127.0.0.1", port)
        while self._ask() != "hit":
            time.sleep(0.1)

    def measure(self, case: Case, seconds: int, clients: int) -> None:
        """Ask for the hit again and again, alone or beside clients that miss."""
        if case.beside == ALONE:
            until = time.monotonic() + seconds
            self._measure(case, lambda: time.monotonic() > until)
            return
        script = self._folder / f"{case.beside}.lua"
        script.write_text(LOAD % (ROUTE, "true" if case.beside == STREAMS else "false"))
        command = ["nice", f"-n{LOAD_NICE}", "wrk", "-t1", f"-c{clients}", f"-d{seconds}s"]
        command += ["--timeout", "60", "-s", str(script), self._address]
        wrk = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._measure(case, lambda: wrk.poll() is not None)
        output = wrk.communicate()[0]
        number = re.search(r"(\d+) requests in", output)
        if number is None or "Non-2xx" in output:
            raise ValueError(f"wrk did not get answers:\n{output}")
        case.misses += int(number[1])

    def _measure(self, case: Case, is_over: Callable[[], bool]) -> None:
        began, waited_s = time.perf_counter(), self._waited_s()
        while not is_over():
            asked = time.perf_counter()
            if self._ask() != "hit":
                raise ValueError("not a hit")
            case.took_s.append(time.perf_counter() - asked)
            time.sleep(0.001)
        case.waited_s += self._waited_s() - waited_s
        case.seconds += time.perf_counter() - began

    def _waited_s(self) -> float:
        """Return how long the event loop's thread was ready to run and did not (s)."""
        # Linux, Documentation/scheduler/sched-stats.rst.
        file = Path(f"/proc/{self._pid}/schedstat")
        return int(file.read_text(encoding="ascii").split()[1]) / 1e9

    def _ask(self) -> str:
        """Ask for the hit; return how it was answered: hit, fwd=miss, or nothing."""
        self._client.request("POST", ROUTE, QUESTION, {"Content-Type": "application/json"})
        response = self._client.getresponse()
        response.read()
        return response.headers.get("Cache-Status", "; ").split("; ")[1]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--answer-bytes", type=int, default=2000)
    parser.add_argument("--engine", action="store_true")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("misses.py needs wrk (apt install wrk)", file=sys.stderr)
        return 2
    own, *others = sorted(os.sched_getaffinity(0))
    if is_pinned := bool(others) and not options.engine:
        os.sched_setaffinity(0, others)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierserve-bench-")))
        if options.engine:
            upstream = stack.enter_context(running_vllm(folder))
        else:
            upstream = _stand_in(stack, options)
        config = {
            "models": {"m": {"upstreams": [f"http://127.0.0.1:{upstream}"], "vllm": {}}},
            "tiers": {"memory": {}, "disk": {"path": str(folder / "disk"), "max_bytes": "4GiB"}},
        }
        process, port = stack.enter_context(running_tierserve(folder, config))
        if is_pinned:
            os.sched_setaffinity(process.pid, [own])
        server = Server(process, port, folder)
        cases = [Case(ALONE), *[Case(BODIES)] * (not options.engine), Case(STREAMS)]
        for _ in range(options.rounds):
            for case in cases:
                server.measure(case, options.seconds, options.clients)
        _print(cases, options.clients)
        if options.engine:
            print_miss_times(through=port, directly=upstream)
    return 0


def _stand_in(stack: ExitStack, options: argparse.Namespace) -> int:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("stand_in.py")), "--port", str(port)]
    command += ["--answer-bytes", str(options.answer_bytes)]
    process = stack.enter_context(running(command, port))
    nice = os.getpriority(os.PRIO_PROCESS, 0) + LOAD_NICE
    os.setpriority(os.PRIO_PROCESS, process.pid, nice)
    return port


def _print(cases: Sequence[Case], clients: int) -> None:
    print(f"{'a hit':<22} {'p50 ms':>7} {'p99 ms':>7} {'p99.9':>7} {'max ms':>7} {'ratio':>6}"
          f" {'loop without a core':>20} {'misses/s':>9}")  # fmt: skip
    alone = cases[0].quantile(0.5)
    for case in cases:
        name = ALONE if case.beside == ALONE else f"beside {clients} {case.beside}"
        p50, p99, p999, longest = (case.quantile(part) for part in (0.5, 0.99, 0.999, 1))
        print(f"{name:<22} {p50:>7.2f} {p99:>7.2f} {p999:>7.2f} {longest:>7.1f}"
              f" {p50 / alone:>6.1f} {case.waited_s / case.seconds:>20.1%}"
              f" {case.misses / case.seconds:>9,.0f}")  # fmt: skip
    ratios = ", ".join(f"{case.quantile(0.5) / alone:.1f} ({case.beside})" for case in cases[1:])
    print_row(f"a hit beside {clients} clients that miss / alone, p50", ratios)


if __name__ == "__main__":
    sys.exit(main())
