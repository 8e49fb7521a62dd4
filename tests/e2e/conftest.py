"""A real tierserve with a real vLLM and the real model, as a child process on a free port."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest

MODEL = "smollm2-135m-instruct"
READY_S = 240


class Server:
    """One tierserve; `start` and `stop` may be called again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = os.environ | {
            "TIERSERVE__SERVER__PORT": str(self.port),
            "TIERSERVE__TIERS__DISK__PATH": str(self.folder / "disk"),
            "TIERSERVE__TIERS__DISK__MAX_BYTES": "64MiB",
            "TIERSERVE__SERVER__SHUTDOWN_GRACE_S": "2",
        }
        command = [sys.executable, "-m", "server.cli", "serve", "--config", "configs/laptop.yaml"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stderr=log)
        self.until(lambda: self.status("/health") == 200, 60)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None

    def wait_ready(self) -> None:
        self.until(lambda: self.status("/ready") == 200, READY_S)

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as exc:
            exc.close()
            return exc.code
        except OSError:
            return 0

    def until(self, holds: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if self.process is None or self.process.poll() is not None:
                pytest.fail("tierserve ended:\n" + (self.folder / "log").read_text()[-4000:])
            if time.monotonic() > deadline:
                pytest.fail("not in time:\n" + (self.folder / "log").read_text()[-4000:])
            time.sleep(0.2)

    def metric(self, path: str, name: str) -> float:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def engine_processes() -> list[int]:
    """Return the ids of the running vLLM servers, without their guards."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                if b"vllm.entrypoints" in command and b"server.guard" not in command:
                    found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    subprocess.run([sys.executable, "scripts/prepare_model.py", "configs/laptop.yaml"], check=True)
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    try:
        yield made
    finally:
        made.stop()
