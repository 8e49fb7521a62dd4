"""A real tierserve with a real vLLM and the real model, as a child process on a free port.

An engine may take minutes to start where others are at work. So nothing here has a bound but the
test, and that has a generous one.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.servers import free_port

MODEL = "smollm2-135m-instruct"
TEST_S = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TEST_S))


class Server:
    """One tierserve; `start` and `stop` may be called again and again.

    Args:
        folder: for its log and its disk tier.
        temporary: for temporary files, nobody else's. Its path is short, as a socket's has to be.
        config: the configuration, but for what is particular to a test.
        variables: of the environment, at each start.
    """

    def __init__(
        self, folder: Path, temporary: Path, config: Path, variables: dict[str, str]
    ) -> None:
        self.folder, self.temporary, self.config = folder, temporary, config
        self.variables = variables
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **variables: str) -> None:
        env = (
            os.environ
            | {
                "TMPDIR": str(self.temporary),
                "TIERSERVE__SERVER__PORT": str(self.port),
                "TIERSERVE__TIERS__DISK__PATH": str(self.folder / "disk"),
                "TIERSERVE__TIERS__DISK__MAX_BYTES": "64MiB",
                "TIERSERVE__ADMIN__SOCKET": str(self.temporary / "admin.sock"),
                "TIERSERVE__SERVER__SHUTDOWN_GRACE_S": "2",
            }
            | self.variables
            | variables
        )
        command = [sys.executable, "-m", "server.cli", "serve", "--config", str(self.config)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stderr=log)
        self.until(lambda: self.status("/health") == 200)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def wait_ready(self) -> None:
        self.until(lambda: self.status("/ready") == 200)

    def openapi(self) -> dict[str, Any]:
        """Return the API's document, once the engine has made its own in time."""
        while True:
            document = json.loads(self.get("/openapi.json")[1])
            if "Described by the engine, once it is ready" not in json.dumps(document["paths"]):
                return document
            time.sleep(0.2)

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the body of a path; 0 if nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()
        except (OSError, HTTPException):
            return 0, ""

    def status(self, path: str) -> int:
        return self.get(path)[0]

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait as long as the server runs; a test that takes too long shows its log."""
        try:
            while not holds():
                if self.process is None or self.process.poll() is not None:
                    pytest.fail("tierserve ended")
                time.sleep(0.2)
        except pytest.fail.Exception as exc:
            exc.msg = f"{exc.msg}:\n{(self.folder / 'log').read_text()[-4000:]}"
            raise

    def session(self) -> int | None:
        """Return the engine's session, which its watchdog leads, once that runs."""
        return next(iter(self.sessions()), None)

    def sessions(self) -> list[int]:
        """Return the engines' sessions, in the order in which they were started."""
        if self.process is None:
            return []
        children = psutil.Process(self.process.pid).children()
        with suppress(ProcessLookupError):
            own = [child for child in children if os.getsid(child.pid) == child.pid]
            # Numbers of processes begin anew after the highest.
            return [child.pid for child in sorted(own, key=psutil.Process.create_time)]
        return []

    def metric(self, path: str, name: str) -> float:
        """Return the sum of a metric's samples, once an engine that has it tells it in time."""
        while (told := self.get(path))[0] != 200:
            self.until(lambda: self.status("/health") == 200)
        lines = told[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def living(session: int) -> list[psutil.Process]:
    """Return the processes of a session: an engine's watchdog and vLLM's, however named."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextmanager
def serving(folder: Path, config: Path, **variables: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="e2e-", dir="/tmp") as temporary:
        made = Server(folder, Path(temporary), config, variables)
        try:
            made.start()
            yield made
        finally:
            made.stop()
            made.client.close()


@contextmanager
def serving_laptop(
    folder: Path, engine_args: dict[str, Any], *, keeps_prefixes: bool = True, wait_s: float = 0
) -> Iterator[Server]:
    """Serve the embedded model, with options of the engine beside those of the configuration.

    Where prefixes are kept, what a prompt gets may depend on what is kept of it: bfloat16 rounds
    another sum otherwise. With `wait_s`, requests wait for an engine that seems to be gone since
    the machine stands still.
    """
    config = Path("configs/laptop.yaml")
    at = "TIERSERVE__MODELS__SMOLLM2_135M_INSTRUCT__"
    if not keeps_prefixes:
        engine_args = engine_args | {"enable_prefix_caching": False}
    args = {
        f"{at}ENGINE__ARGS__{name.upper()}": json.dumps(engine_args[name]) for name in engine_args
    }
    args[f"{at}WAIT_FOR_ENGINE_S"] = str(wait_s)
    # Otherwise the blocks would be in the cache folder.
    prefix = {"TIERSERVE__TIERS__PREFIX__PATH": str(folder / "prefix")}
    if not keeps_prefixes:
        prefix = {"TIERSERVE__TIERS__PREFIX": "null"}
    with serving(folder, config, **args, **prefix) as made:
        yield made


@pytest.fixture(scope="module")
def engine_args() -> dict[str, Any]:
    """Options of the engine, beside those of the configuration; a module may have its own."""
    return {}


@pytest.fixture(scope="module")
def server(tmp_path_factory, engine_args: dict[str, Any]) -> Iterator[Server]:
    with serving_laptop(tmp_path_factory.mktemp("server"), engine_args) as made:
        yield made
