"""What any process needs at its start: open standard streams, and, as process 1, an init's work.

Nothing here knows what the process is for.
"""

import os
import signal
import sys
from contextlib import suppress

_STREAMS = ("stdin", "r"), ("stdout", "w"), ("stderr", "w")
# Those that whoever runs a container sends to its first process.
_FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip


def open_standard_streams() -> None:
    """Open the null device in place of each standard stream that is closed.

    Else the next file or socket would take its number, and what is printed go there.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest number that is free, which is this one.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def ignore_signals() -> None:
    """Ignore the signals that ask programs to open their logs or read files again, and end others.

    Children ignore them, too.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def become_child_of_init() -> None:
    """As process 1, such as in a container, return in a child, and do an init's work beside it.

    Orphans become children of process 1, which has to wait for each of them to end: of an engine's
    processes when it is killed, or of what is run in the container by hand. Also, the system keeps
    most signals from process 1. The child gets those that we get, and we end as it does.
    """
    if os.getpid() != 1:
        return
    # Held until there is somebody to forward them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child:
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: _send(child, number))
    else:
        # What a terminal sends to its whole group comes through us, once.
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    if child:
        os._exit(_status_of(child))


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _status_of(child: int) -> int:
    """Wait for all children that end, until that one does; returns its status as shells tell it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
