"""Prepares any process at its start: standard streams, signals, and the duties of process 1."""

import os
import signal
import sys
from contextlib import suppress

_STREAMS = ("stdin", "r"), ("stdout", "w"), ("stderr", "w")
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
