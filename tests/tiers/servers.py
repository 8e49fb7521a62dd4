"""Redis and Memcached, as servers of a test's own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


class Server:
    """A server on the loopback interface, with a port of its own.

    Args:
        command: starts it in the foreground, given a port.
    """

    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which(name) is None:
            pytest.skip(f"{name} isn't installed")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        port = str(self.port)
        self.command = {
            "redis-server": [
                name, "--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", str(folder),
            ],
            "memcached": [name, "-l", "127.0.0.1", "-p", port, "-u", "nobody", "-m", "16"],
        }[name]  # fmt: skip

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(1000):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        pytest.fail(f"{self.command} doesn't listen")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def hang(self) -> None:
        """Have it accept connections and say nothing, until it is killed."""
        os.kill(self.process.pid, signal.SIGSTOP)
