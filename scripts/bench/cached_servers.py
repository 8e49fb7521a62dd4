"""The servers that hits are compared on: how each is configured, started, filled and checked.

Each is filled by requests, through an upstream that gives everybody the same answer and that has
ended before anything is measured: a miss would be an error. As a program, this file is that
upstream, and the bare handler: `cached_servers.py PORT FILE CONTENT_TYPE`.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import web
from servers import free_port, running, running_tierserve
from wrk import ROUTE, Load

from server.config.folders import cache_folder

KEY = "sk-benchmark-" + "k" * 32
"""The only tenant's."""
LITELLM = ("litellm[proxy]==1.108.7", "diskcache==5.6.3")
ONE_CORE = (0,)
"""Where servers run that are compared with one another."""
_RAM = Path("/dev/shm")  # noqa: S108
_START_S = 120
_QUESTION_LIMIT = 2 * 1024 * 1024
_differing = re.compile(rb'("(?:id|created)":)(?:"[^"]*"|\d+)')
# The key has a question's whole text and stands before the answer in a cache file, hence the large
# buffers.
_NGINX = """
{user}
daemon off; worker_processes 1; worker_rlimit_nofile 16384; pid nginx.pid; error_log error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  proxy_cache_path cache keys_zone=answers:64m max_size=8g inactive=1d use_temp_path=off;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    client_max_body_size {limit}; client_body_buffer_size {limit}; client_body_in_single_buffer on;
    location / {{
      proxy_pass http://127.0.0.1:{upstream};
      proxy_cache answers; proxy_cache_methods POST; proxy_cache_valid 200 1d;
      proxy_cache_key $request_uri$request_body;
      proxy_buffer_size {limit}; proxy_buffers 4 {limit}; proxy_busy_buffers_size {limit};
      add_header Cache-Status $upstream_cache_status;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class RunningServer:
    """A server that listens."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"
    cores: Sequence[int] = ONE_CORE
    hit: str = ""
    """What `Cache-Status` contains in a hit."""
    is_verbatim: bool = True
    """Whether it gives the answer's bytes, but for id and time; otherwise the same text."""

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def load_cores(self) -> Sequence[int]:
        """The cores for the load generator: one that is free, or else all of the server's."""
        free = [core for core in range(os.cpu_count() or 1) if core not in self.cores]
        return free[:1] or self.cores

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes so far."""
        ticks, pids = 0, [self.process.pid]
        while pids:
            folder = Path(f"/proc/{pids.pop()}")
            # Linux, proc_pid_stat(5): utime and stime, behind the name in parentheses.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for task in (folder / "task").iterdir():
                # A thread may end meanwhile.
                with suppress(FileNotFoundError):
                    pids += map(int, (task / "children").read_text().split())
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def replying(file: Path, content_type: str) -> Iterator[RunningServer]:
    """Run a bare aiohttp handler that gives the bytes of a file to each question."""
    port = free_port()
    command = [sys.executable, __file__, str(port), str(file), content_type]
    with running(command, port, cores=ONE_CORE) as process:
        yield RunningServer("bare", port, process)


@contextmanager
def tierserve(
    folder: Path,
    upstream: int,
    *,
    memory: bool,
    fields: Mapping[str, Any],
    cores: Sequence[int] = ONE_CORE,
) -> Iterator[RunningServer]:
    """Run the product.

    Args:
        folder: is made, for its files.
        upstream: the port of its upstream.
        memory: whether it has a memory tier above the disk tier.
        fields: of its configuration, in place of those that all cases have.
        cores: on which it runs.
    """
    folder.mkdir()
    tiers: dict[str, Any] = {"disk": {"path": str(folder / "disk"), "max_bytes": "1GiB"}}
    if not memory:
        tiers["memory"] = None
    config: dict[str, Any] = {
        "tenants": {"key": KEY},
        "models": {"m": {"upstreams": [f"http://127.0.0.1:{upstream}"], "vllm": {}}},
        "tiers": tiers,
        **fields,
    }
    with running_tierserve(folder, config, cores=cores) as (process, port):
        # One of several workers has an answer in memory, others find it on disk.
        tier = "memory" if memory else "disk"
        hit = f"detail={tier}" if cores == ONE_CORE else "; hit; "
        yield RunningServer(folder.name, port, process, cores, hit)


@contextmanager
def nginx(_: Path, upstream: int) -> Iterator[RunningServer]:
    """Run nginx with a cache whose key has the question, and whose files are in memory."""
    place = _RAM if _RAM.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="bench-", dir=place) as folder:
        port = free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        file = Path(folder) / "nginx.conf"
        limit = _QUESTION_LIMIT
        file.write_text(_NGINX.format(user=user, port=port, upstream=upstream, limit=limit))
        command = ["nginx", "-p", folder, "-c", str(file), "-e", "error.log"]
        with running(command, port, cores=ONE_CORE) as process:
            yield RunningServer("nginx", port, process, hit="HIT")


@contextmanager
def litellm(folder: Path, upstream: int, *, cache: str) -> Iterator[RunningServer]:
    """Run the LiteLLM proxy; `cache` is the type of its cache, `local` or `disk`."""
    folder.mkdir()
    port = free_port()
    to = {"model": "openai/m", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    params = {"type": cache, "ttl": 86400, "disk_cache_dir": str(folder / "disk")}
    config = {
        "model_list": [{"model_name": "m", "litellm_params": to}],
        "litellm_settings": {"cache": True, "cache_params": params},
        "general_settings": {"master_key": KEY},
    }
    file = folder / "config.yaml"
    file.write_bytes(orjson.dumps(config))
    command = [str(_litellm_environment() / "bin/litellm"), "--host", "127.0.0.1", "--port",
               str(port), "--config", str(file), "--telemetry", "False"]  # fmt: skip
    # It would look up prices elsewhere.
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with running(command, port, cores=ONE_CORE, env=env) as process:
        yield RunningServer(folder.name, port, process, is_verbatim=False)


def _litellm_environment() -> Path:
    """Return the folder of LiteLLM's own Python environment, which is made the first time."""
    caches = cache_folder()
    if caches is None:
        raise FileNotFoundError("there is no cache folder: neither HOME nor XDG_CACHE_HOME is set")
    folder = caches / "bench" / LITELLM[0].replace("[proxy]==", "-")
    made = folder / "made"
    if not made.exists():
        print(f"installing {' '.join(LITELLM)} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = ["-m", "pip", "install", "-qq", "--disable-pip-version-check", *LITELLM]
        subprocess.run([str(folder / "bin/python"), *install], check=True)
        made.touch()
    return folder


def fill(server: RunningServer, load: Load) -> None:
    """Have a server store the answer to each question."""
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=30)) as client:
        _wait_until_answering(client, load)
        # Some servers store after they have answered: the second time finds what is missing.
        for question in [*load.questions, *load.questions]:
            _ask(client, question, load.headers)


def check(server: RunningServer, load: Load, answer: bytes) -> None:
    """Check that a server gives the upstream's answer to each question, from where it should.

    Raises:
        ValueError: it doesn't.
    """
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=30)) as client:
        for question in load.questions:
            status, cache_status, body = _ask(client, question, load.headers)
            same = _blank if server.is_verbatim else _text
            if status != 200 or server.hit not in cache_status or same(body) != same(answer):
                raise ValueError(
                    f"{server.name} answered {status} {cache_status!r} with {len(body)} bytes "
                    f"in place of a hit with {len(answer)}: {body[:400]!r}"
                )


def _wait_until_answering(client: HTTPConnection, load: Load) -> None:
    until = time.monotonic() + _START_S
    while _ask(client, load.questions[0], load.headers)[0] != 200:
        if time.monotonic() > until:
            raise TimeoutError(f"port {client.port} does not answer questions")
        time.sleep(0.1)


def _ask(
    client: HTTPConnection, question: bytes, headers: Mapping[str, str]
) -> tuple[int, str, bytes]:
    """Return status, `Cache-Status` and body; the connection stays open."""
    client.request("POST", ROUTE, question, dict(headers))
    response = client.getresponse()
    return response.status, response.headers.get("Cache-Status", ""), response.read()


def _blank(body: bytes) -> bytes:
    return _differing.sub(rb"\1", body)


def _text(body: bytes) -> str:
    return str(orjson.loads(body)["choices"][0]["message"]["content"])


async def _reply(port: int, answer: bytes, content_type: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=answer, content_type=content_type)

    app = web.Application(client_max_size=_QUESTION_LIMIT)
    app.router.add_post(ROUTE, handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_reply(int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), sys.argv[3]))
