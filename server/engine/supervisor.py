"""An engine: vLLM's own OpenAI server as our child, watched and restarted.

Owns the child process and the folder of its socket. Invariant: at most one child runs, and its
guard (`server.engine.guard`) ends it when we are gone, however we went.

The folder is among temporary files, since `XDG_RUNTIME_DIR` goes when its user logs out. Cleaners
of temporary files pass young ones by, so we keep the socket young. Where one removes it
nevertheless, nobody can connect any more, so the engine is ended and started anew.
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
from typing import Any
from uuid import UUID

import orjson

from server.config.environment import PREFIX
from server.config.folders import ENGINE_SOCKET, has_home, is_socket_path, new_engine_folder
from server.config.models import RUNTIME_LORA, ModelConfig
from server.engine.upstream import Upstream
from server.engine.weights import Weights

logger = logging.getLogger(__name__)

# `vllm serve` without its console script, which fails in the CPU build.
_VLLM = "vllm.entrypoints.launchers.api_server.entry"
# It is asked for these all the time, and we log what clients ask for.
_QUIET = {"disable_access_log_for_endpoints": "/health,/metrics,/v1/models"}
_STABLE_S = 60
# What still loads then has long taken its memory, or waits for a hub.
_LOADING_S = 600
_STOP_S = 15
_LAST_WORDS_S = 5
_LINE_BYTES = 8192
_LOOK_S = 10
# As in «(EngineCore pid=7) ERROR 11-24 …», or «(APIServer pid=1) ERROR:    …» of uvicorn.
_LEVEL = re.compile(rb"(?:\([^)]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL):? ").match


class EngineState(StrEnum):
    """What can be expected of the engine."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


class Engine:
    """Supervises one vLLM server on a Unix socket in a private folder.

    Args:
        name: by which it knows its model.
        model: describes it.
        weights: what it loads.
        loading: held by the one engine that loads. vLLM measures how much memory is free while it
            does, which another one would falsify.
        before_start: awaited before each start, in which it reads its files.

    Raises:
        ConfigError: the folder for temporary files has too long a path.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        weights: Weights,
        loading: asyncio.Lock,
        *,
        before_start: Callable[[], Awaitable[None]],
    ) -> None:
        self._name, self._loading, self._before_start = name, loading, before_start
        self.folder = new_engine_folder()
        socket = str(self.folder / ENGINE_SOCKET)
        self.upstream = Upstream(
            "http://engine",
            timeout_s=model.timeout_s,
            socket=socket,
            name=f"the engine of {name}",
        )
        self.restarts = 0
        self._runs = False
        self._was_ready_s = 0.0
        self._max_delay_s = model.engine.restart_max_delay_s
        self._command = [
            sys.executable, "-m", "server.engine.guard", str(self.folder),
            sys.executable, "-m", "server.engine.shielded", _VLLM, "--model", weights.source,
            "--served-model-name", name, *model.aliases, "--uds", socket,
            *(("--revision", weights.revision) if weights.revision else ()),
            *_flags(_QUIET | _lora(weights) | model.engine.args),
        ]  # fmt: skip
        # Our own variables may hold secrets.
        env = {n: v for n, v in os.environ.items() if not n.upper().startswith(PREFIX)}
        self._env = env | model.engine.env | {RUNTIME_LORA: "0"}
        # vLLM leaves the sockets of its processes behind, which it names by UUIDs.
        if is_socket_path(self.folder / str(UUID(int=0))):
            self._env.setdefault("VLLM_RPC_BASE_PATH", str(self.folder))
        if weights.folder is not None:
            self._env.setdefault("HF_HUB_OFFLINE", "1")
        if not has_home():
            # Else vLLM makes a folder that is called ~ where we are.
            self._env.setdefault("HOME", str(self.folder))

    @property
    def state(self) -> EngineState:
        """`DOWN` is between the end of one run and the start of the next."""
        if self.upstream.ready:
            return EngineState.READY
        return EngineState.STARTING if self._runs else EngineState.DOWN

    async def run(self) -> None:
        """Keep the engine running until cancelled, then end it."""
        delay_s = 1.0
        try:
            while True:
                try:
                    logger.error("the engine of %s %s", self._name, await self._run_once())
                except OSError as exc:
                    logger.error("the engine of %s could not be started: %s", self._name, exc)
                # Loading may take minutes, so only what was ready counts as having run.
                delay_s = 1.0 if self._was_ready_s > _STABLE_S else delay_s
                logger.info("the engine of %s is started again in %.0f s", self._name, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, self._max_delay_s)
                self.restarts += 1
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _run_once(self) -> str:
        """Run vLLM to its end, or until nobody can connect to it; returns which it was."""
        self._was_ready_s, self._runs = 0.0, True
        try:
            async with AsyncExitStack() as stack:
                async with self._loading:
                    await self._before_start()
                    process = await stack.enter_async_context(self._process())
                    is_over = asyncio.create_task(self._over(process))
                    stack.callback(is_over.cancel)
                    await self._loaded(is_over)
                return await is_over
        finally:
            self._runs = False

    async def _loaded(self, is_over: "asyncio.Task[str]") -> None:
        """Wait until vLLM answers or has ended, but not for ever."""
        answers = asyncio.create_task(self.upstream.answers.wait())
        try:
            await asyncio.wait(
                [is_over, answers], timeout=_LOADING_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            answers.cancel()

    async def _over(self, process: asyncio.subprocess.Process) -> str:
        """Wait until vLLM has ended, or its socket is gone; returns which it was."""
        socket, was_there = self.folder / ENGINE_SOCKET, False
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                try:
                    os.utime(socket)
                    was_there = True
                except FileNotFoundError:
                    if was_there or not self.folder.exists():
                        return f"can't be reached any more: somebody removed {socket}"
                await asyncio.wait([ended], timeout=_LOOK_S)
            return f"ended with status {ended.result()}"
        finally:
            ended.cancel()

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start vLLM; ends it and all that it has started."""
        # What an engine has left there that ended by itself.
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        start = asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )
        process = await _not_broken_off(start)
        logger.info("the engine of %s starts", self._name)
        stopping = asyncio.Event()
        log = asyncio.create_task(_log_lines(process, logger.getChild(self._name), stopping))
        ended = asyncio.create_task(process.wait())
        try:
            yield process
        finally:
            self._was_ready_s, self.upstream.ready = self.upstream.ready_s, False
            if process.returncode is None:
                # vLLM takes its own stop for a failure, with tracebacks.
                stopping.set()
            if process.stdin is not None:
                # Its guard ends it then.
                process.stdin.close()
            await asyncio.wait([ended], timeout=_STOP_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Why it ended is often the last that it says.
            await asyncio.wait([log, ended], timeout=_LAST_WORDS_S)
            log.cancel()
            ended.cancel()


async def _not_broken_off(
    start: Coroutine[Any, Any, asyncio.subprocess.Process],
) -> asyncio.subprocess.Process:
    """Start a process that whoever is cancelled meanwhile gets nevertheless, and so can end.

    The cancellation follows at what is awaited next.
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
    process: asyncio.subprocess.Process, to: logging.Logger, stopping: asyncio.Event
) -> None:
    """Log what the engine prints, in pieces of a bounded size; for debugging if it is stopped."""
    output = process.stdout
    if output is None:
        return
    rest = b""
    while piece := await output.read(_LINE_BYTES):
        *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        if len(rest) > _LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _log(line, to, stopping)
    _log(rest, to, stopping)


def _log(line: bytes, to: logging.Logger, stopping: asyncio.Event) -> None:
    if line.strip():
        level = _LEVEL(line)
        number = logging.getLevelName(level[1].decode()) if level else logging.INFO
        if stopping.is_set():
            number = logging.DEBUG
        to.log(number, "%s", line.decode(errors="replace"))


def _lora(weights: Weights) -> dict[str, Any]:
    """Return vLLM's options for adapters that clients may ask for."""
    if not weights.adapters:
        return {}
    modules = [
        orjson.dumps({"name": name, "path": str(folder)}).decode()
        for name, folder in weights.adapters.items()
    ]
    return {"enable_lora": True, "lora_modules": modules}


def _flags(args: Mapping[str, Any]) -> Iterator[str]:
    """Return vLLM's command-line options for the configured ones."""
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
