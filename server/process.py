"""Prepares any process: standard streams, signals, tasks, the duties of process 1, systemd."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, MutableMapping
from contextlib import suppress
from math import inf
from typing import Any

logger = logging.getLogger(__name__)

_STREAMS = ("stdin", "r"), ("stdout", "w"), ("stderr", "w")
# One stop may come twice: from a service manager that signals all processes, and from our parent.
_ONE_STOP_S = 0.5
# Signals that container runtimes send to a container's first process.
_FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip


def open_standard_streams() -> None:
    """Open the null device in place of each standard stream that is closed.

    Otherwise the next file or socket would take the stream's number, and prints would go there.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            # The system gives it the lowest free number, which is this one.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def ignore_signals() -> None:
    """Ignore the signals by which log rotation asks programs to reopen files; they would end us.

    Children inherit that.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def become_child_of_init() -> None:
    """Return in a child if this is process 1, as in a container; the parent acts as init.

    Process 1 has to reap orphans, such as those of a killed engine or of commands that are run in
    the container, and the system keeps most signals from it. So the parent reaps, forwards its
    signals to the child, and exits with the child's status.
    """
    if os.getpid() != 1:
        return
    # Blocked until there is a child to forward them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child:
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: _send(child, number))
    else:
        # A terminal signals its whole group; the parent alone forwards that, once.
        os.setpgid(0, 0)
        # Sockets that the process inherits are for the child (`server.web.inherited_sockets`).
        if os.environ.get("LISTEN_PID") == "1":
            os.environ["LISTEN_PID"] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    if child:
        os._exit(_status_of(child))


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _status_of(child: int) -> int:
    """Reap children until `child` ends; returns its exit status as shells report it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


class Draining:
    """Whether this process is about to stop, and still serves.

    It isn't ready then, each answer closes its connection, and no request waits for an engine.
    """

    def __init__(self) -> None:
        self.has_begun = False
        """No method, since each hit would pay for it."""
        self._then: list[Callable[[], object]] = []

    def then(self, call: Callable[[], object]) -> None:
        """Call this once it begins, at once if it has."""
        if self.has_begun:
            call()
        else:
            self._then.append(call)

    def begin(self) -> None:
        """Begin, unless it has begun."""
        if not self.has_begun:
            self.has_begun = True
            for call in self._then:
                call()


def handle_signals(
    stop: asyncio.Event, draining: Draining, drain_s: float, on_hangup: Callable[[], None]
) -> None:
    """Handle signals from now on; needs an event loop.

    Args:
        stop: is set at SIGINT, and `drain_s` after SIGTERM.
        draining: begins at either.
        drain_s: nobody who sends SIGINT, by Ctrl-C, waits for load balancers.
        on_hangup: is called at SIGHUP.
    """
    loop = asyncio.get_running_loop()

    def leave(after_s: float) -> None:
        draining.begin()
        loop.call_later(after_s, stop.set)

    on_stop = stop_handler(leave)
    loop.add_signal_handler(signal.SIGTERM, on_stop, drain_s)
    loop.add_signal_handler(signal.SIGINT, on_stop, 0.0)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)


def stop_handler(
    leave: Callable[[float], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[float], None]:
    """Return a handler that calls `leave` at its first call, and ends the process at the second."""
    stopped_at = inf

    def on_stop(after_s: float) -> None:
        nonlocal stopped_at
        now = clock()
        if now > stopped_at + _ONE_STOP_S:
            # Engines and workers end when this process has ended.
            os._exit(130)
        if stopped_at == inf:
            stopped_at = now
            leave(after_s)

    return on_stop


class Tasks:
    """Background tasks of a process; if one fails, the process stops.

    Args:
        stop: is set then.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._tasks: list[asyncio.Task[None]] = []
        self.failed = False
        """Whether one has failed."""

    def start(self, *works: Coroutine[Any, Any, None]) -> None:
        """Run these until they end, fail or are cancelled."""
        for work in works:
            task = asyncio.create_task(work)
            task.add_done_callback(self._end)
            self._tasks.append(task)

    async def cancel(self) -> None:
        """Cancel all, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.critical("a task of the server failed", exc_info=exc)
            self.failed = True
            self._stop.set()


class ServiceManager:
    """The service manager that has started this process, if it is one that wants to be notified.

    It is systemd with `Type=notify`, or what speaks its protocol: datagrams to a Unix socket. The
    variables that name it are removed, so that children don't notify it.

    Args:
        environment: of this process.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        # Linux writes the first byte of an abstract address, which is 0, as `@`.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        if environment.pop("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            watchdog_us = ""
        self._alive_every_s = int(watchdog_us) / 2e6 if watchdog_us.isdecimal() else 0.0

    def notify(self, state: str) -> None:
        """Send a state, such as `READY=1`; never waits and never fails."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.connect(self._address)
                sender.send(state.encode())
        except OSError as exc:
            logger.warning("the service manager can't be told %s: %s", state, exc)

    async def keep_alive(self) -> None:
        """Tell the watchdog twice in its time that the event loop runs, until cancelled."""
        while self._alive_every_s:
            self.notify("WATCHDOG=1")
            await asyncio.sleep(self._alive_every_s)
