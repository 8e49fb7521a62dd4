"""Servers that benchmarks run: on a free port of the loopback, until they are no more needed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from server.config.models import EMBEDDED, ModelConfig
from server.engine.dtype import default_dtype
from server.engine.weights import embedded_folder

_START_S = 900.0
"""An engine may take minutes where others are at work."""
_STOP_S = 120.0
_VLLM = "vllm.entrypoints.launchers.api_server.entry"
VLLM_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # With a connector vLLM would reserve one CPU more, and have other threads.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
MODEL = "m"
"""By which all servers here call their model."""


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Return whether a server accepts connections."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def answers(path: str) -> Callable[[int], bool]:
    """Return a function that says whether a server answers 200 at a path."""

    def answers_there(port: int) -> bool:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        with suppress(OSError, HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status == 200
        return False

    return answers_there


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    *,
    cores: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    is_ready: Callable[[int], bool] = is_listening,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server with all its processes; it is ready when this yields.

    Args:
        command: of the server.
        port: where it listens.
        cores: on which it runs; all if none are given.
        env: variables beside our own.
        log: takes what it prints.
        is_ready: says of the port whether it is ready.

    Raises:
        ChildProcessError: it ended, or wasn't ready in time.
    """
    on = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    with Path(log or os.devnull).open("ab") as out:
        process = subprocess.Popen(
            [*on, *command], env=os.environ | dict(env or {}), stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + _START_S
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > until:
                told = "" if log is None else log.read_text(errors="replace")[-2000:]
                raise ChildProcessError(f"{' '.join(command)} did not start:\n{told}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def vllm_command(options: Mapping[str, Any]) -> list[str]:
    """Return the command that serves the embedded model by vLLM, as `MODEL`.

    Args:
        options: of its command line, beside those that all benchmarks share.
    """
    given: dict[str, Any] = {
        "model": str(embedded_folder()), "served_model_name": MODEL, "host": "127.0.0.1",
        "max_model_len": 4096, "dtype": options.get("dtype") or best_dtype(),
        "enforce_eager": True, "enable_prompt_tokens_details": True, **options,
    }  # fmt: skip
    command = [sys.executable, "-m", _VLLM]
    for name, value in given.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        command += ["--" + name.replace("_", "-"), *[text] * (value is not True)]
    return command


@contextmanager
def running_vllm(
    folder: Path,
    options: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    cpu: int | None = None,
) -> Iterator[int]:
    """Run vLLM with the embedded model, as `MODEL`; gives its port.

    Args:
        folder: of its log.
        options: of its command line, beside those that all benchmarks share.
        dtype: in which it computes; by default what this processor is good at.
        cpu: the only one on which it computes; by default all but one.
    """
    port = free_port()
    given = {"port": port, **({} if dtype is None else {"dtype": dtype}), **(options or {})}
    command = vllm_command(given)
    ready = answers("/health")
    env = VLLM_ENV | ({} if cpu is None else {"VLLM_CPU_OMP_THREADS_BIND": str(cpu)})
    with running(command, port, env=env, log=folder / "vllm.log", is_ready=ready):
        yield port


@contextmanager
def running_tierserve(
    folder: Path,
    config: Mapping[str, Any],
    *,
    cores: Sequence[int] = (),
    needs_engine: bool = False,
) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Run the product without an admin socket; gives its process and port.

    Args:
        folder: of its configuration and log.
        config: its fields, but for the port.
        cores: on which it runs; all if none are given.
        needs_engine: whether to wait until its engine answers, too.
    """
    port = free_port()
    fields = {"admin": {"socket": None}, "log": {"level": "warning"}, **config}
    fields["server"] = {"port": port, **config.get("server", {})}
    file = folder / "config.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(fields))
    command = [sys.executable, "-m", "server.cli", "serve", "--config", str(file)]
    ready = answers("/ready" if needs_engine else "/health")
    with running(command, port, cores=cores, log=folder / "log", is_ready=ready) as process:
        yield process, port


def loaded(
    url: str, workload: str, users: int, seconds: int, *options: str, cache: str = "cold"
) -> dict[str, Any]:
    """Load a server that serves `MODEL` by `tierserve bench`; returns its result.

    Raises ChildProcessError if there is none.
    """
    command = [
        sys.executable, "-m", "server.cli", "bench", url, "--workload", workload, "--ignore-eos",
        "--cache", cache, "--model", MODEL, "--json", "--users", str(users),
        "--duration", str(seconds), *options,
    ]  # fmt: skip
    print(f"{workload}, {users} users, {seconds} s, {url}", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    # 1 is a run that isn't valid, which its row says.
    if done.returncode not in (0, 1) or not done.stdout:
        raise ChildProcessError(f"tierserve bench ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def best_dtype() -> str:
    """Return the dtype in which this machine computes best."""
    return default_dtype(ModelConfig(source=EMBEDDED), embedded_folder()) or "auto"
