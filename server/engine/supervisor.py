"""The supervisor of an engine: runs vLLM's own OpenAI server as a child process, and restarts it.

Owns the child process and the folder of its socket. Invariant: at most one child runs, and its
watchdog (`server.engine.parent_watchdog`) ends it when we end, by kill -9 too.

The folder is among temporary files, since `XDG_RUNTIME_DIR` is removed when its user logs out.
Cleaners of temporary files skip young ones, so we keep the socket young. Where one removes the
socket nevertheless, no connection is possible any more, so the engine is restarted.
"""

import asyncio
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from enum import StrEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import orjson

from server.config.environment import PREFIX
from server.config.folders import ENGINE_SOCKET, has_home, is_socket_path, new_engine_folder
from server.config.models import RUNTIME_LORA, ModelConfig
from server.engine.threads import thread_variables
from server.engine.upstream import ENGINE_URL, Upstream
from server.engine.weights import Weights
from tiers.prefix_kv.options import KEY_VARIABLE

logger = logging.getLogger(__name__)

# As `vllm serve`, whose console script fails in the CPU build.
_VLLM = "vllm.entrypoints.launchers.api_server.entry"
# Our probes and scrapes would fill its access log; clients' requests are in ours.
_ACCESS_LOG = {"disable_access_log_for_endpoints": "/health,/metrics,/v1/models"}
_STABLE_S = 60
# An engine that loads longer has already taken its memory, or waits for a hub.
_LOADING_S = 600
# Longer than the watchdog takes.
_STOP_S = 15
_DRAIN_OUTPUT_S = 5
_LINE_BYTES = 8192
_SOCKET_CHECK_S = 10
# As in «(EngineCore pid=7) ERROR 11-24 …», or «(APIServer pid=1) ERROR:    …» of uvicorn.
_LEVEL = re.compile(rb"(?:\([^)]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL):? ").match


class EngineState(StrEnum):
    """Whether an engine takes requests, or is expected to."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


class Engine:
    """Supervises one vLLM server on a Unix socket in a private folder.

    Args:
        name: the model's name.
        model: the model's configuration.
        weights: the weights to load.
        loading: a lock that an engine holds while it loads. vLLM measures the free memory then,
            which another engine that loads would change.
        before_start: awaited before each start, since the engine reads its files anew; returns
            further options of vLLM for this start.
        secrets: variables for vLLM that configurations can't set.

    Raises:
        ConfigError: the path of the folder for temporary files is too long.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        weights: Weights,
        loading: asyncio.Lock,
        *,
        before_start: Callable[[], Awaitable[Mapping[str, Any]]],
        secrets: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._name, self._loading, self._before_start = name, loading, before_start
        self.folder = new_engine_folder()
        self.socket = str(self.folder / ENGINE_SOCKET)
        self.upstream = Upstream(
            ENGINE_URL,
            timeout_s=model.timeout_s,
            socket=self.socket,
            name=f"the engine of {name}",
        )
        self.restarts = 0
        self._is_running = False
        self._last_ready_s = 0.0
        self._max_delay_s = model.engine.restart_max_delay_s
        # `-P`, or modules would first be looked for in the working directory.
        self._command = [
            sys.executable, "-P", "-m", "server.engine.parent_watchdog", str(self.folder),
            sys.executable, "-P", "-m", "server.engine.signal_shield", _VLLM,
            "--model", weights.source,
            "--served-model-name", name, *model.aliases, "--uds", self.socket,
            *(("--revision", weights.revision) if weights.revision else ()),
            *_flags(_ACCESS_LOG | _lora_options(weights) | model.engine.args),
        ]  # fmt: skip
        # Variables of tierserve may hold secrets.
        env = {n: v for n, v in os.environ.items() if not n.upper().startswith(PREFIX)}
        self._env = env | model.engine.env | {RUNTIME_LORA: "0"}
        self._env |= thread_variables(model.engine.args, self._env)
        # One of another program's would not be that of our files.
        self._env.pop(KEY_VARIABLE, None)
        self._env |= secrets
        # vLLM leaves the sockets between its processes behind; they are named by UUIDs.
        if is_socket_path(self.folder / str(UUID(int=0))):
            self._env.setdefault("VLLM_RPC_BASE_PATH", str(self.folder))
        if weights.folder is not None:
            self._env.setdefault("HF_HUB_OFFLINE", "1")
        if not has_home():
            # Else vLLM makes a folder named ~ in the working directory.
            self._env.setdefault("HOME", str(self.folder))

    @property
    def state(self) -> EngineState:
        """Its state; `DOWN` between the end of one run and the start of the next."""
        if self.upstream.ready:
            return EngineState.READY
        return EngineState.STARTING if self._is_running else EngineState.DOWN

    async def run(self) -> None:
        """Keep the engine running until cancelled, then end it."""
        delay_s = 1.0
        try:
            while True:
                try:
                    logger.error("the engine of %s %s", self._name, await self._run_once())
                except OSError as exc:
                    logger.error("the engine of %s could not be started: %s", self._name, exc)
                # Loading may take minutes, so only the time in which it was ready counts.
                delay_s = 1.0 if self._last_ready_s > _STABLE_S else delay_s
                logger.info("the engine of %s is started again in %.0f s", self._name, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, self._max_delay_s)
                self.restarts += 1
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _run_once(self) -> str:
        """Run vLLM until it ends or can't be reached; returns which, for the log."""
        self._last_ready_s, self._is_running = 0.0, True
        try:
            async with AsyncExitStack() as stack:
                async with self._loading:
                    more = await self._before_start()
                    process = await stack.enter_async_context(self._running_process(more))
                    end = asyncio.create_task(self._wait_for_end(process))
                    stack.callback(end.cancel)
                    await self._wait_until_loaded(end)
                return await end
        finally:
            self._is_running = False

    async def _wait_until_loaded(self, end: "asyncio.Task[str]") -> None:
        """Wait until vLLM is ready or has ended, for a limited time."""
        ready = asyncio.create_task(self.upstream.ready_event.wait())
        try:
            await asyncio.wait(
                [end, ready], timeout=_LOADING_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()

    async def _wait_for_end(self, process: asyncio.subprocess.Process) -> str:
        """Wait until vLLM has ended or its socket was removed; returns which, for the log."""
        socket, existed = self.folder / ENGINE_SOCKET, False
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                try:
                    os.utime(socket)
                    existed = True
                except FileNotFoundError:
                    if existed or not self.folder.exists():
                        return f"can't be reached any more: somebody removed {socket}"
                await asyncio.wait([ended], timeout=_SOCKET_CHECK_S)
            return f"ended with status {ended.result()}"
        finally:
            ended.cancel()

    @asynccontextmanager
    async def _running_process(
        self, more: Mapping[str, Any]
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start vLLM with `more` options, and end it with all its child processes at the exit."""
        # An engine that ended by itself leaves files there.
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # Before it starts, since it could be ready as soon as it has.
        self.upstream.mark_started()
        start = asyncio.create_subprocess_exec(
            *self._command,
            *_flags(more),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )
        process = await _uninterrupted(start)
        logger.info("the engine of %s starts", self._name)
        stopping = asyncio.Event()
        log = asyncio.create_task(_log_lines(process, logger.getChild(self._name), stopping))
        ended = asyncio.create_task(process.wait())
        try:
            yield process
        finally:
            self._last_ready_s = self.upstream.ready_s
            # Before it is stopped: an answer that it aborts must not count as complete.
            self.upstream.mark_stopped()
            if process.returncode is None:
                # vLLM logs its own stop as a failure, with tracebacks.
                stopping.set()
            if process.stdin is not None:
                # Then its watchdog stops it.
                process.stdin.close()
            await asyncio.wait([ended], timeout=_STOP_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Its last lines often hold the reason for its end.
            await asyncio.wait([log, ended], timeout=_DRAIN_OUTPUT_S)
            log.cancel()
            ended.cancel()


async def _uninterrupted(
    start: Coroutine[Any, Any, asyncio.subprocess.Process],
) -> asyncio.subprocess.Process:
    """Start a process, and return it even if the task is cancelled, so that it can end the process.

    The cancellation is raised at the task's next await.
    """
    starting, is_cancelled = asyncio.create_task(start), False
    while not starting.done():
        try:
            await asyncio.wait([starting])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled and (task := asyncio.current_task()) is not None:
        task.cancel()
    return starting.result()


async def _log_lines(
    process: asyncio.subprocess.Process, engine_log: logging.Logger, stopping: asyncio.Event
) -> None:
    """Log the engine's output, in pieces of a bounded size; at level DEBUG while it is stopped."""
    output = process.stdout
    if output is None:
        return
    rest = b""
    while piece := await output.read(_LINE_BYTES):
        *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        if len(rest) > _LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _log_line(line, engine_log, stopping)
    _log_line(rest, engine_log, stopping)


def _log_line(line: bytes, engine_log: logging.Logger, stopping: asyncio.Event) -> None:
    if line.strip():
        level = _LEVEL(line)
        number = logging.getLevelName(level[1].decode()) if level else logging.INFO
        if stopping.is_set():
            number = logging.DEBUG
        engine_log.log(number, "%s", line.decode(errors="replace"))


def _lora_options(weights: Weights) -> dict[str, Any]:
    """Return vLLM's options that load the adapters."""
    if not weights.adapters:
        return {}
    modules = [
        orjson.dumps({"name": name, "path": str(folder)}).decode()
        for name, folder in weights.adapters.items()
    ]
    return {"enable_lora": True, "lora_modules": modules}


def _flags(args: Mapping[str, Any]) -> Iterator[str]:
    """Return the configured options as arguments of vLLM's command line."""
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            yield flag
        elif value is False:
            yield flag.replace("--", "--no-", 1)
        elif isinstance(value, list):
            yield flag
            yield from map(str, value)
        elif value is not None:
            yield flag
            yield orjson.dumps(value).decode() if isinstance(value, dict) else str(value)
