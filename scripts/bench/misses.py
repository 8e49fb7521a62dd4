"""The latency of a memory hit alone, and beside clients whose requests all miss and are stored.

A server with both tiers stands before an upstream that answers at once. One client asks for the
same memory hit again and again, a millisecond apart: first alone, then while wrk's connections ask
for what no tier holds, so that every answer is generated, stored and committed. All processes share
the machine's cores. So the table also shows for which share of the time the server's event loop was
ready to run and had no core: a latency that grows with it says nothing about the server.

Needs wrk. Usage: misses.py [--seconds N] [--connections N] [--answer-bytes N]
"""

import argparse
import asyncio
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import cast

import orjson
import uvloop

ROUTE = "/v1/chat/completions"
CONFIG = """
server: {{port: {port}}}
models: {{m: {{upstreams: ["http://127.0.0.1:{upstream}"], vllm: {{}}}}}}
tiers: {{memory: {{}}, disk: {{path: {disk}, max_bytes: 4GiB}}}}
"""
LOAD = f"""
local asked = 0
wrk.headers["Content-Type"] = "application/json"
request = function()
  asked = asked + 1
  return wrk.format("POST", "{ROUTE}", nil, '{{"model":"m","temperature":0,"messages":'
    .. '[{{"role":"user","content":"' .. os.time() .. " " .. asked .. '"}}]}}')
end
"""
QUESTION = b'{"model":"m","temperature":0,"messages":[{"role":"user","content":"again"}]}'


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--answer-bytes", type=int, default=2000)
    parser.add_argument("--upstream", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        uvloop.run(_upstream(options.upstream, _reply(options.answer_bytes)))
        return 0
    if shutil.which("wrk") is None:
        print("misses.py needs wrk (apt install wrk)", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierserve-bench-")))
        upstream, port = _free_port(), _free_port()
        answer_bytes = str(options.answer_bytes)
        command = [__file__, "--upstream", str(upstream), "--answer-bytes", answer_bytes]
        stack.enter_context(_process(command, upstream))
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(port=port, upstream=upstream, disk=folder / "disk"))
        command = ["-m", "server.cli", "serve", "--config", str(config)]
        server = stack.enter_context(_process(command, port))
        (folder / "load.lua").write_text(LOAD)
        client = HTTPConnection("127.0.0.1", port)
        while _ask(client) != "hit":
            time.sleep(0.1)
        print(f"{'a hit':<22} {'p50 ms':>7} {'p99 ms':>7} {'p99.9':>7} {'max ms':>7}"
              f" {'loop without a core':>20} {'misses/s':>9}")  # fmt: skip
        until = time.monotonic() + options.seconds
        _measure("alone", client, server.pid, lambda: time.monotonic() > until)
        wrk = subprocess.Popen(
            ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}s",
             "-s", str(folder / "load.lua"), f"http://127.0.0.1:{port}"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        beside = f"beside {options.connections} that miss"
        _measure(beside, client, server.pid, lambda: wrk.poll() is not None, end="")
        output = wrk.communicate()[0]
        rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
        if rate is None or "Non-2xx" in output:
            raise ValueError(f"wrk did not get answers:\n{output}")
        print(f" {float(rate[1]):>9,.0f}")
    return 0


def _measure(
    name: str, client: HTTPConnection, pid: int, is_over: Callable[[], bool], end: str = "\n"
) -> None:
    took, began, waited_s = [], time.perf_counter(), _waited_s(pid)
    while not is_over():
        asked = time.perf_counter()
        if _ask(client) != "hit":
            raise ValueError("not a hit")
        took.append(time.perf_counter() - asked)
        time.sleep(0.001)
    share = (_waited_s(pid) - waited_s) / (time.perf_counter() - began)
    took.sort()
    at = [took[min(int(len(took) * part), len(took) - 1)] * 1e3 for part in (0.5, 0.99, 0.999, 1)]
    print(f"{name:<22} {at[0]:>7.2f} {at[1]:>7.2f} {at[2]:>7.2f} {at[3]:>7.1f}"
          f" {share:>20.1%}", end=end, flush=True)  # fmt: skip


def _waited_s(pid: int) -> float:
    """Return how long the process's first thread was ready to run and did not (s)."""
    # Linux, Documentation/scheduler/sched-stats.rst.
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def _ask(client: HTTPConnection) -> str:
    """Ask for the hit; return how it was answered: hit, fwd=miss, or nothing."""
    client.request("POST", ROUTE, QUESTION, {"Content-Type": "application/json"})
    response = client.getresponse()
    response.read()
    return response.headers.get("Cache-Status", "; ").split("; ")[1]


@contextmanager
def _process(command: list[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until it is no more needed."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _reply(answer_bytes: int) -> bytes:
    message = {"role": "assistant", "content": "why not " * (answer_bytes // 8)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 20, "total_tokens": 120, "completion_tokens": 100}
    body = orjson.dumps(
        {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion", "created": 1700000000,
         "model": "m", "choices": [choice], "usage": usage}
    )  # fmt: skip
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class _AtOnce(asyncio.Protocol):
    """Gives the same reply to each request."""

    def __init__(self, reply: bytes) -> None:
        self._reply, self._got = reply, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            self._got = b""
            self._transport.write(self._reply)


async def _upstream(port: int, reply: bytes) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: _AtOnce(reply), "127.0.0.1", port
    )
    await server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
