"""The machines of the benchmark with what runs on them, and clients of the replicas."""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from network import Machine, build

CONFIG = Path(__file__).parents[3] / "configs/replicas.yaml"
REPLICAS, ENGINES = ("front1", "front2"), ("gpu1", "gpu2")
MODEL = "large"
_CHAT = "/v1/chat/completions"
_ENGINE = Path(__file__).parent / "counting_engine.py"
# The clock is set before anything of ours is imported.
_WITH_CLOCK = """
import sys, time
real, ahead_s = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + ahead_s
from server.cli import main
sys.exit(main(sys.argv[1:]))
"""
_START_S = 600
# Of a namespace that nobody else reaches.
_ALL = "0.0.0.0"  # noqa: S104


class Reply(NamedTuple):
    """What a replica answered."""

    status: int
    """0 where the connection broke or was refused."""
    cache_status: str
    engine: str
    begun: int
    """When its generation began, on the monotonic clock of this machine in nanoseconds."""
    age_s: int
    took_s: float


class Replica:
    """A tierserve on a machine.

    Args:
        machine: where it runs.
        folder: of its disk tier, log and admin socket.
        ahead_s: by how many seconds its clock is ahead.
        when_unreachable: the configuration's field of that name.
    """

    def __init__(
        self, machine: Machine, folder: Path, *, ahead_s: float, when_unreachable: str
    ) -> None:
        self.machine, self.folder = machine, folder
        self._ahead_s, self._when_unreachable = ahead_s, when_unreachable
        self._socket = folder / "admin.sock"
        folder.mkdir()

    async def start(self) -> None:
        """Start it, and wait until it is ready."""
        shared = {"url": "redis://redis:6379/0", "when_unreachable": self._when_unreachable}
        env = {
            "TIERSERVE__SERVER__WORKERS": "1",
            "TIERSERVE__ADMIN__SOCKET": str(self._socket),
            "TIERSERVE__TIERS__DISK__PATH": str(self.folder / "disk"),
            "PYTHONPATH": str(Path.cwd()),
        }
        if self._when_unreachable != "serve":
            env["TIERSERVE__TIERS__SHARED"] = json.dumps(shared)
        command = [sys.executable, "-c", _WITH_CLOCK, str(self._ahead_s), "serve"]
        self._process = self.machine.start(
            [*command, "--config", str(CONFIG)], self.folder / "log", env
        )
        self.session = aiohttp.ClientSession(
            f"http://{self.machine.name}:8000",
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(60),
        )
        until = time.monotonic() + _START_S
        while not await _answers(self.session, "/ready"):
            if self._process.poll() is not None or time.monotonic() > until:
                raise ChildProcessError((self.folder / "log").read_text()[-3000:])
            await asyncio.sleep(0.1)

    async def ask(self, prompt: str, **fields: Any) -> Reply:
        """Ask for a chat completion."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}],
                "temperature": 0, "max_tokens": 8} | fields  # fmt: skip
        begun = time.monotonic()
        try:
            async with self.session.post(_CHAT, json=body) as response:
                told = await response.json()
                took_s = time.monotonic() - begun
                if response.status != 200:
                    return Reply(response.status, "", "", 0, 0, took_s)
                content = told["choices"][0]["message"]["content"]
                engine, number, *_ = [*content.split(" "), ""]
                status = response.headers.get("Cache-Status", "")
                age_s = int(response.headers.get("Age", 0))
                number = int(number) if number.isdecimal() else 0
                return Reply(200, status, engine, number, age_s, took_s)
        except (aiohttp.ClientError, TimeoutError):
            return Reply(0, "", "", 0, 0, time.monotonic() - begun)

    async def purge(self, **what: Any) -> int:
        """Purge; returns the status of the answer."""
        connector = aiohttp.UnixConnector(str(self._socket))
        async with (
            aiohttp.ClientSession("http://admin", connector=connector) as session,
            session.post("/purge", json=what) as response,
        ):
            await response.read()
            return response.status

    async def metric(self, name: str) -> float:
        """Return the sum of a metric's values."""
        async with self.session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(name))

    def memory_bytes(self) -> int:
        """Return how much memory it has that no other process shares."""
        text = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if "Private" in line)

    def cpu_s(self) -> float:
        """Return how many seconds of CPU its processes have taken."""
        text = self.machine.output("ps", "-o", "pid=", "-g", str(self._process.pid))
        pids = [line.strip() for line in text.splitlines()]
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")

    def disk_bytes(self) -> int:
        """Return how much its disk tier takes."""
        files = [file for file in (self.folder / "disk").rglob("*") if file.is_file()]
        return sum(512 * file.stat().st_blocks for file in files)

    async def kill(self) -> None:
        """End it as a crash would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)

    async def close(self) -> None:
        """Close the client; the machine ends the process."""
        if hasattr(self, "session"):
            await self.session.close()


class Fleet:
    """Everything.

    Args:
        folder: of all files.
        ahead_s: by how many seconds the clock of the second replica is ahead.
        is_vllm: whether engines are real ones.
        when_unreachable: what a replica does that can't reach Redis.
    """

    def __init__(
        self, folder: Path, *, ahead_s: float, is_vllm: bool, when_unreachable: str
    ) -> None:
        self.folder, self.is_vllm = folder, is_vllm
        self.machines = build(folder, ["redis", *ENGINES, *REPLICAS])
        self.redis = self.machines["redis"]
        self.when_unreachable = when_unreachable
        self.a, self.b = (
            Replica(
                self.machines[name],
                folder / name,
                ahead_s=ahead_s * (name == REPLICAS[1]),
                when_unreachable=when_unreachable,
            )
            for name in REPLICAS
        )
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Start all servers."""
        options = ["--bind", _ALL, "--protected-mode", "no", "--save", "", "--dir"]
        self.redis_process = self.redis.start(
            ["redis-server", *options, str(self.folder)], self.folder / "redis.log"
        )
        for name in ENGINES:
            log = self.folder / f"{name}.log"
            command = [sys.executable, str(_ENGINE), name]
            if self.is_vllm:
                from servers import VLLM_ENV, vllm_command

                command, env = (
                    vllm_command({"served_model_name": MODEL, "host": _ALL, "port": 8000}),
                    VLLM_ENV,
                )
                self.machines[name].start(command, log, env)
            else:
                self.machines[name].start(command, log)
        await self._until_engines_answer("/health" if self.is_vllm else "/counts")
        await self.a.start()
        await self.b.start()

    async def _until_engines_answer(self, path: str) -> None:
        until = time.monotonic() + _START_S
        async with aiohttp.ClientSession() as session:
            for name in ENGINES:
                while not await _answers(session, f"http://{name}:8000{path}"):
                    if time.monotonic() > until:
                        raise ChildProcessError((self.folder / f"{name}.log").read_text()[-3000:])
                    await asyncio.sleep(0.1)

    def prompt(self) -> str:
        """Return a prompt that nobody has asked before."""
        return f"What is {next(self._numbers)}?"

    async def counts(self) -> dict[str, int]:
        """Return how often each prompt was generated, by both engines."""
        total: dict[str, int] = {}
        async with aiohttp.ClientSession() as session:
            for name in ENGINES:
                async with session.get(f"http://{name}:8000/counts") as response:
                    for prompt, times in (await response.json()).items():
                        total[prompt] = total.get(prompt, 0) + times
        return total

    async def generated(self) -> int:
        """Return how many requests the engines have answered."""
        if not self.is_vllm:
            return sum((await self.counts()).values())
        # They also count the tokens by which they are probed.
        sent = [
            await replica.metric("tierserve_upstream_requests_total")
            for replica in (self.a, self.b)
        ]
        return int(sum(sent))

    def stop_redis(self, is_stopped: bool) -> None:
        """Have Redis stand still, or go on."""
        os.killpg(self.redis_process.pid, signal.SIGSTOP if is_stopped else signal.SIGCONT)

    def slow_redis(self, is_slow: bool) -> None:
        """Have Redis stand still for 30 ms of each 40, or no more."""
        if is_slow:
            self._slowing = asyncio.create_task(self._keep_slowing())
        else:
            self._slowing.cancel()
            self.stop_redis(False)

    async def _keep_slowing(self) -> None:
        while True:
            self.stop_redis(True)
            await asyncio.sleep(0.03)
            self.stop_redis(False)
            await asyncio.sleep(0.01)

    def redis_info(self) -> dict[str, float]:
        """Return the numbers that Redis tells of itself."""
        told = self.redis.output("redis-cli", "info", "everything")
        fields: dict[str, float] = {}
        for line in told.splitlines():
            name, _, value = line.partition(":")
            if name.startswith("cmdstat_"):
                value = value.partition(",")[0].removeprefix("calls=")
            if value.replace(".", "", 1).isdecimal():
                fields[name] = float(value)
        return fields

    async def stop(self) -> None:
        """End everything."""
        for replica in (self.a, self.b):
            await replica.close()
        self.stop_redis(False)
        for machine in self.machines.values():
            await asyncio.to_thread(machine.stop)


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
