"""Redis and Memcached of Debian's packages, on this machine only, that tests may torment."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from aiocache.base import BaseCache

from server.cache import open_cache
from tests.waiting import HANGS_S

# Below those that the system gives to whoever wants any, and of one pytest-xdist worker alone: a
# port must stay free until who is told of it listens, and while that is started again.
_FIRST_PORT, _PORTS = 10_000, 5_000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
_numbers = itertools.count(random.randrange(_PORTS))


def free_port() -> int:
    while True:
        port = _FIRST_PORT + _worker * _PORTS + next(_numbers) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _listens(family: int, address: str | tuple[str, int]) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


class StoreServer:
    """A server that keeps nothing when it ends; `url` stays the same when it is started again."""

    program: str
    package: str

    def __init__(self, folder: Path) -> None:
        if shutil.which(self.program) is None:
            pytest.fail(f"{self.program} isn't there; apt-get install {self.package}")
        self.folder = folder
        self.port = free_port()
        self.start()

    @property
    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def url(self) -> str:
        raise NotImplementedError

    def open(self) -> BaseCache:
        """Return the shared tier's backend on this server, as each process has one of its own."""
        return open_cache(self.url)

    @property
    def addresses(self) -> list[tuple[int, str | tuple[str, int]]]:
        """Where it listens, with the address's family."""
        return [(socket.AF_INET, ("127.0.0.1", self.port))]

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + HANGS_S
        while not all(_listens(*each) for each in self.addresses):
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                pytest.fail(f"{self.program} didn't start: {self.process.returncode}")
            time.sleep(0.01)

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # Until its last thread has stopped it may still answer.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, line: str) -> bytes:
        """Send a line over a connection of its own and return the first line of the reply."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=HANGS_S) as wire:
            wire.sendall(line.encode() + b"\r\n")
            return wire.makefile("rb").readline().strip()


class RedisServer(StoreServer):
    program, package = "redis-server", "redis-server"

    @property
    def command(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "dir": str(self.folder),
            "unixsocket": str(self._socket),
        }
        return [self.program, *(part for name in options for part in (f"--{name}", options[name]))]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def _socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def addresses(self) -> list[tuple[int, str | tuple[str, int]]]:
        # It begins to listen at one after the other.
        return [*super().addresses, (socket.AF_UNIX, str(self._socket))]

    @property
    def unix_url(self) -> str:
        return f"unix://{self._socket}?db=1"


class MemcachedServer(StoreServer):
    program, package = "memcached", "memcached"

    @property
    def command(self) -> list[str]:
        return [
            self.program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-m", "64",
            "-u", "nobody",
        ]  # fmt: skip

    @property
    def url(self) -> str:
        return f"memcached://127.0.0.1:{self.port}"


SERVERS = {"redis": RedisServer, "memcached": MemcachedServer}
