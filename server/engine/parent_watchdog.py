"""Runs the engine as a command, and ends it when its parent ends.

Usage: `python -m server.engine.parent_watchdog FOLDER COMMAND …`.

Standard input is a pipe whose other end our parent holds. The whole process group ends when the
pipe closes (the parent closes it or ends, by kill -9 too) or when the command ends. We lead that
group, since we are started in a session of our own. When the pipe has closed, we remove the folder
with the engine's socket. Otherwise the parent owns that folder, and would mistake its removal for a
cleaner's. Signals have no effect: a service manager sends them to each process, and our parent
decides when we end.
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

from server.engine.signal_shield import STOP_SIGNAL
from server.process import ignore_signals

_KILL_AFTER_S = 10
_REPEAT_AFTER_S = 1


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
    # Our parent never writes, so the pipe is readable only once it has closed.
    if select.select([0], [], [], 0)[0]:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    _kill_rest_of_group()
    return status if status >= 0 else 128 - status


def _watch(child: "subprocess.Popen[bytes]") -> None:
    # Not through sys.stdin: a thread must not hold its lock when the interpreter ends.
    while os.read(0, 4096):
        pass
    _stop(child)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Ask it to stop, and kill it if it doesn't: vLLM may wait for running requests for ever.

    vLLM may miss the signal while it loads, so it is sent twice; a serving one handles the two as
    one stop.
    """
    began = time.monotonic()
    child.send_signal(STOP_SIGNAL)
    _wait(child, began + _REPEAT_AFTER_S)
    child.send_signal(STOP_SIGNAL)
    _wait(child, began + _KILL_AFTER_S)
    child.kill()


def _wait(child: "subprocess.Popen[bytes]", until: float) -> None:
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.1)


def _kill_rest_of_group() -> None:
    """Kill the processes that the command left behind in our process group."""
    group, own = os.getpgrp(), os.getpid()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():  # noqa: PTH208, PTH112
        if name.isdigit() and int(name) != own:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(int(name)) == group:
                    os.kill(int(name), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
