"""Runs the engine so that it can't outlive us: `python -m server.guard FOLDER COMMAND …`.

Standard input is a pipe whose other end our parent holds. When it closes (the parent has ended,
by kill -9 too), or the command ends, or SIGTERM comes, the whole process group is ended and the
folder with the engine's socket removed. The group is our own: we are started as its leader.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

_GRACE_S = 10


def main() -> int:
    """Run the command to its end and return its exit status."""
    folder, *command = sys.argv[1:]
    # The command inherits the default, since handlers don't pass through exec.
    signal.signal(signal.SIGTERM, lambda *_: _in_background(_stop, child))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603
    _in_background(_watch, child)
    status = child.wait()
    shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    _end_group_but_us()
    return status if status >= 0 else 128 - status


def _in_background(
    do: "Callable[[subprocess.Popen[bytes]], None]", child: "subprocess.Popen[bytes]"
) -> None:
    threading.Thread(target=do, args=(child,), daemon=True).start()


def _watch(child: "subprocess.Popen[bytes]") -> None:
    # Not through sys.stdin, whose lock a thread must not hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    _stop(child)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End it gently if it can: vLLM may wait for ever for requests under way."""
    child.terminate()
    deadline = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    child.kill()


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
