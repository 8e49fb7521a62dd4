"""Runs the engine so that it can't outlive us: `python -m server.engine.guard FOLDER COMMAND …`.

Standard input is a pipe whose other end our parent holds. When it closes (the parent wants that or
has ended, by kill -9 too), or the command ends, the whole process group is ended. The group is our
own: we are started as its leader. When the pipe has closed, the folder with the engine's socket is
removed; else our parent has it, who takes a folder that goes for one that somebody else removes.
Signals change nothing: a service manager sends them to each process, and our parent decides when we
end.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

from server.process import ignore_signals

_GRACE_S = 10
_AGAIN_S = 1


def main() -> int:
    """Run the command to its end and return its exit status."""
    folder, *command = sys.argv[1:]
    ignore_signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        # The command inherits the default, since handlers don't pass through exec.
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    status = child.wait()
    # Our parent never writes, so there is something to read once the pipe has closed.
    if select.select([0], [], [], 0)[0]:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    _end_group_but_us()
    return status if status >= 0 else 128 - status


def _watch(child: "subprocess.Popen[bytes]") -> None:
    # Not through sys.stdin, whose lock a thread must not hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    _stop(child)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End it gently if it can: vLLM may wait for ever for requests under way.

    SIGTERM doesn't reach it (`server.engine.shielded`). While it loads it notices SIGINT only when
    it is sent once more, which a vLLM that serves takes for the same stop.
    """
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    _wait(child, began + _AGAIN_S)
    child.send_signal(signal.SIGINT)
    _wait(child, began + _GRACE_S)
    child.kill()


def _wait(child: "subprocess.Popen[bytes]", until: float) -> None:
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.1)


def _end_group_but_us() -> None:
    """Kill what the command left behind in our process group."""
    group, us = os.getpgrp(), os.getpid()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():  # noqa: PTH208, PTH112
        if name.isdigit() and int(name) != us:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(int(name)) == group:
                    os.kill(int(name), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
