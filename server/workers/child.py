"""A worker's process, as the master has it: started, told what changes, replaced when it dies."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from server.app import CLOSING_S
from server.config.schema import ServerConfig
from server.workers.link import Link, LinkError, LinkHandler, door
from server.workers.setup import Setup

logger = logging.getLogger(__name__)

_FIRST_DELAY_S, _MAX_DELAY_S = 0.5, 10.0
_TELL_AGAIN_S = 0.5
# The status that shells give a command that can't be started.
_NOT_STARTED = 126


class WorkerError(Exception):
    """A worker can't be started."""


class WorkerProcess:
    """One worker. Invariant: at most one process of its number runs.

    Args:
        number: from 0.
        listeners: its listening sockets, which stay open when it dies.
        setup: returns what it is told at its start, by its number, its side of the door, and the
            numbers of its listening sockets.
        answer: answers it; given this worker.
        state: what it is to know besides: the body of a POST by its path. A body that changes is
            another object.
        on_end: called when a process of it has died.
        options: of servers.
    """

    def __init__(
        self,
        number: int,
        listeners: Sequence[socket.socket],
        setup: Callable[[int, int, Sequence[int]], Setup],
        state: Callable[[], Mapping[str, Any]],
        answer: Callable[["WorkerProcess"], LinkHandler],
        on_end: Callable[["WorkerProcess"], None],
        options: ServerConfig,
    ) -> None:
        self.number, self._listeners, self._setup = number, listeners, setup
        self._state = state
        self._answer, self._on_end, self._options = answer(self), on_end, options
        self.link: Link | None = None
        """The link to the process that runs now."""
        self.ready = asyncio.Event()
        """Set while it answers clients."""
        self._has_been_ready = self._is_stopping = False
        self._ended = asyncio.Event()
        self._told: dict[str, Any] = {}
        self._telling: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Keep the worker running until it is stopped.

        Raises:
            WorkerError: its first process ended before it was ready.
        """
        delay_s = 0.0
        while True:
            status = await self._run_once()
            if self._is_stopping:
                if status:
                    raise WorkerError(f"worker {self.number} stopped with status {status}")
                return
            if not self._has_been_ready:
                raise WorkerError(f"worker {self.number} ended at its start, with status {status}")
            # One that was ready costs its second of start; one that never is could cost all time.
            if self.ready.is_set():
                delay_s = 0.0
            else:
                delay_s = min(max(2 * delay_s, _FIRST_DELAY_S), _MAX_DELAY_S)
            self.ready.clear()
            text = "worker %d ended with status %d; another takes its place in %.1f s"
            logger.error(text, self.number, status, delay_s)
            await asyncio.sleep(delay_s)
            if self._is_stopping:
                return

    def note_ready(self) -> None:
        """Note that it answers clients."""
        self._has_been_ready = True
        self.ready.set()

    def tell(self) -> None:
        """Have it told what has changed; it is told again until it answers."""
        if self.link is not None and (self._telling is None or self._telling.done()):
            state = self._state()
            changed = {path: state[path] for path in state if self._told[path] is not state[path]}
            if changed:
                self._telling = asyncio.create_task(self._tell(changed))

    async def call(self, method: str, path: str, json: Any = None, **options: Any) -> bytes:
        """Ask it, as `Link.call` does.

        Raises:
            LinkError: it doesn't answer in time, or isn't there.
        """
        if self.link is None:
            raise LinkError(f"worker {self.number} is being replaced")
        return await self.link.call(method, path, json, **options)

    async def drain(self) -> None:
        """Have it drain; one that takes a dead one's place learns it when it is ready."""
        try:
            await self.call("POST", "/drain")
        except LinkError as exc:
            logger.warning("worker %d: %s", self.number, exc)

    async def stop(self, grace_s: float) -> None:
        """Let its requests end within `grace_s`, then end it; `run` returns after that."""
        self._is_stopping = True
        try:
            await self.call("POST", "/stop")
        except LinkError as exc:
            if self.link is None:
                return
            logger.warning("worker %d is killed: %s", self.number, exc)
            self._kill()
        else:
            try:
                async with asyncio.timeout(grace_s + CLOSING_S):
                    await self._ended.wait()
            except TimeoutError:
                logger.error("worker %d is killed: it doesn't end", self.number)
                self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _tell(self, changed: Mapping[str, Any]) -> None:
        link, has_failed = self.link, False
        for path, body in changed.items():
            try:
                await self.call("POST", path, body)
            except LinkError as exc:
                # The rest may be revoked keys.
                logger.warning("worker %d: %s", self.number, exc)
                has_failed = True
            else:
                if self.link is link:
                    self._told[path] = body
        if has_failed:
            await asyncio.sleep(_TELL_AGAIN_S)

    async def _run_once(self) -> int:
        """Run a process of it to its end; returns its exit status."""
        try:
            ours, setup = await self._start()
        except OSError as exc:
            # The machine may have no room for it now.
            logger.error("worker %d can't be started: %s", self.number, exc)
            return _NOT_STARTED
        self._ended.clear()
        self.link = link = Link(ours, self._options)
        try:
            await link.start(self._answer)
            stdin = self._process.stdin
            if stdin is not None:
                with suppress(ConnectionError):
                    stdin.write(setup.pickled())
                    await stdin.drain()
            return await self._process.wait()
        finally:
            # It ends when its standard input is closed.
            self.link = None
            self._on_end(self)
            self._ended.set()
            await link.close()

    async def _start(self) -> tuple[socket.socket, Setup]:
        """Start a process of it; returns our side of the door, and what it is to be told."""
        ours, theirs = door()
        with theirs:
            self._told = {**self._state()}
            setup = self._setup(
                self.number, theirs.fileno(), [each.fileno() for each in self._listeners]
            )
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    # Or modules would first be looked for in the working directory.
                    "-P",
                    "-m",
                    "server.workers.worker",
                    stdin=asyncio.subprocess.PIPE,
                    # A Ctrl-C is the master's, also while a worker can't ignore it yet.
                    start_new_session=True,
                    pass_fds=(theirs.fileno(), setup.counters, *setup.listeners),
                )
            except OSError:
                ours.close()
                raise
        return ours, setup
