"""Runs a program whose processes all go on at SIGTERM: `python -m server.shielded MODULE …`.

Who stops a service sends it to each of its processes at once, as systemd does. vLLM would break off
what it generates, while we let answers end. It may install what handlers it likes: the signal is
blocked, which processes inherit from who starts them. SIGINT ends it as SIGTERM would. vLLM's own
processes don't hear each other's SIGTERM either, and are killed when the time for that is over.
"""

import runpy
import signal
import sys
from multiprocessing.resource_tracker import ensure_running


def main() -> None:
    """Run the module that the arguments name, as `python -m` does."""
    # The first one who needs it starts it, and it unblocks the signal for good then (Python 3.11).
    ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
