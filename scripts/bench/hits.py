"""Hits of the whole product against a bare aiohttp handler, as ratios of requests per second.

Three servers run side by side, pinned to one core, with uvloop: the product answering from its
memory tier, the product answering from its disk tier (it has no other), and an aiohttp handler
that reads the same bodies and returns the same bytes. wrk, pinned to another core, asks them in
turn, so that other work of the machine slows all three alike. A process of the lowest priority
keeps wrk's core awake: a sleeping core wakes slowly, above all a virtual one, and the server would
pay for it. A ratio is the median of the rounds' ratios.

Answers are asked for in the encoding in which they are stored; a hit in the other one is converted,
which takes about 2 ms for 500 tokens more. Questions have 100 and 4,000 bytes; longer ones aren't
measured. Compare two versions by runs that alternate on one quiet machine.

Needs wrk and two cores. Usage: hits.py [--rounds N] [--seconds N] [--connections N] [--questions N]
"""

import argparse
import asyncio
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import orjson
import uvloop
from aiohttp import web

from server.auth.tenant import open_tenant
from server.config.load import load
from server.engine.models import Models
from server.protocol import template
from server.protocol.formats import Encoding
from server.protocol.request import parse_request
from tiers import Answer, Chain, DiskCache, FrequencySketch, Freshness, Tier

SERVER_CORE, LOAD_CORE = 0, 1
ROUTE = "/v1/chat/completions"
ENTRY_BYTES = 64 * 1024 * 1024
WORDS = ["the", "sky", "scatters", "light", "of", "short", "waves", "more", "than", "red", "so"]
CONFIG = """
server: {{port: {port}}}
models: {{m: {{upstreams: ["http://127.0.0.1:1"], vllm: {{}}}}}}
tiers: {{memory: {memory}, disk: {{path: {disk}, max_bytes: {max_bytes}}}}}
"""
LOAD = """
local bodies, at = {{}}, 0
function init()
  wrk.headers["Content-Type"] = "application/json"
  for line in io.lines({file!r}) do
    bodies[#bodies + 1] = wrk.format("POST", {route!r}, nil, line)
  end
end
request = function()
  at = at % #bodies + 1
  return bodies[at]
end
"""


def main() -> int:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--questions", type=int, default=512, help="how many different ones")
    parser.add_argument("--bare", nargs=2, metavar=("PORT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        uvloop.run(_bare(int(options.bare[0]), Path(options.bare[1]).read_bytes()))
        return 0
    if shutil.which("wrk") is None or (os.cpu_count() or 1) < 2:
        print("hits.py needs wrk (apt install wrk) and two cores", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        stack.enter_context(_awake(LOAD_CORE))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierserve-bench-")))
        print(f"{'question':>10} {'answer':>8}  {'bare/s':>8} {'memory/s':>9} {'disk/s':>8}"
              f"  {'memory/bare':>11} {'disk/bare':>9}")  # fmt: skip
        for question_bytes, answer_bytes in ((100, 300), (4000, 2000)):
            _measure(folder / str(question_bytes), question_bytes, answer_bytes, options)
    return 0


def _measure(
    folder: Path, question_bytes: int, answer_bytes: int, options: argparse.Namespace
) -> None:
    folder.mkdir()
    bodies = [_question(number, question_bytes) for number in range(options.questions)]
    (folder / "bodies").write_bytes(b"\n".join(bodies))
    (folder / "load.lua").write_text(LOAD.format(file=str(folder / "bodies"), route=ROUTE))
    (folder / "answer").write_bytes(_answer(0, answer_bytes))
    with ExitStack() as stack:
        bare = stack.enter_context(
            _server("bare", [__file__, "--bare", "{port}", str(folder / "answer")])
        )
        products = []
        for name, memory in (("memory", "{}"), ("disk", "null")):
            config = folder / f"{name}.yaml"
            text = CONFIG.format(port=0, memory=memory, disk=folder / name, max_bytes=ENTRY_BYTES)
            config.write_text(text)
            asyncio.run(_fill(config, bodies, answer_bytes))
            command = ["-m", "server.cli", "serve", "--config", str(config)]
            products.append(stack.enter_context(_server(name, command)))
        urls = [bare, *products]
        for url in urls:
            _check(url, bodies[0], hit=url != bare)
            _load(url, folder, 1, options.connections)
        rates = [
            [_load(url, folder, options.seconds, options.connections) for url in urls]
            for _ in range(options.rounds)
        ]
    rate = [statistics.median(column) for column in zip(*rates, strict=True)]
    ratio = [statistics.median(row[of] / row[0] for row in rates) for of in (1, 2)]
    print(f"{question_bytes:>8} B {answer_bytes:>6} B"
          f"  {rate[0]:>8.0f} {rate[1]:>9.0f} {rate[2]:>8.0f}"
          f"  {ratio[0]:>11.2f} {ratio[1]:>9.2f}", flush=True)  # fmt: skip


def _question(number: int, size: int) -> bytes:
    content = f"Question {number}: " + "why is the sky blue? " * (size // 21)
    messages = [{"role": "user", "content": content[:size]}]
    return orjson.dumps({"model": "m", "messages": messages, "temperature": 0, "max_tokens": 500})


def _answer(number: int, size: int) -> bytes:
    # Words by chance, so that compression has something to do.
    words = Random(number).choices(WORDS, k=size)  # noqa: S311
    message = {"role": "assistant", "content": " ".join(words)[:size]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 20, "total_tokens": 120, "completion_tokens": 100}
    return orjson.dumps(
        {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion", "created": 1700000000,
         "model": "m", "choices": [choice], "usage": usage}
    )  # fmt: skip


async def _fill(file: Path, bodies: list[bytes], answer_bytes: int) -> None:
    """Store an answer to every body in the disk tier that `file` describes."""
    config = load(file)
    disk = config.tiers.disk
    if disk is None or disk.path is None:
        raise ValueError("the benchmark's configuration has a disk tier")
    chain = Chain(
        [Tier("disk", DiskCache(disk.path, disk.max_bytes))],
        frequency=FrequencySketch(1),
        max_answer_bytes=config.cache.max_answer_bytes,
    )
    models = Models(config.models)
    names = models.names()
    for number, body in enumerate(bodies):
        stored = Answer(
            Encoding.JSON, template.json_template(orjson.loads(_answer(number, answer_bytes)))
        )
        request = parse_request(ROUTE, body, open_tenant(""), names)
        await chain.store(request.key, stored, Freshness(config.cache.ttl_s))
    await models.close()
    await chain.close()


@contextmanager
def _server(name: str, command: list[str]) -> Iterator[str]:
    """Run a server on a free port of the server's core, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, *(part.replace("{port}", port) for part in command)],
        env=os.environ | {"TIERSERVE__SERVER__PORT": port},
        stderr=subprocess.DEVNULL,
    )
    os.sched_setaffinity(process.pid, {SERVER_CORE})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url + "/health", timeout=1).close()  # noqa: S310
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise TimeoutError(f"the {name} server did not start")
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _awake(core: int) -> Iterator[None]:
    """Keep a core from sleeping, without taking time from anybody."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(process.pid, {core})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _check(url: str, body: bytes, *, hit: bool) -> None:
    """Check that the measured responses have the expected `Cache-Status`."""
    asked = urllib.request.Request(url + ROUTE, body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(asked, timeout=10) as response:  # noqa: S310
        if hit and "; hit" not in response.headers["Cache-Status"]:
            raise ValueError(f"not a hit: {response.headers['Cache-Status']}")


def _load(url: str, folder: Path, seconds: int, connections: int) -> float:
    """Return requests per second; every answer has to be a 200."""
    command = ["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s",
               "-s", str(folder / "load.lua"), url]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    if found is None or "Non-2xx" in output:
        raise ValueError(f"wrk did not get answers:\n{output}")
    return float(found[1])


async def _bare(port: int, answer: bytes) -> None:
    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=answer, content_type="application/json")

    app = web.Application()
    app.router.add_post(ROUTE, handler)
    app.router.add_get("/health", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
