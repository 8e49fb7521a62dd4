"""Runs a program whose processes all go on at SIGTERM: `python -m server.engine.shielded MODULE …`.

A service manager such as systemd sends it to each process of a service at once. vLLM would break
off what it generates, while we let answers end. So the signal is blocked, whatever handlers vLLM
installs, and its children inherit that. SIGINT ends vLLM as SIGTERM would. Its processes don't get
each other's SIGTERM either, and are killed when the time for a stop is over.
"""

import runpy
import signal
import sys
from multiprocessing.resource_tracker import ensure_running


def main() -> None:
    """Run the module that the arguments name, as `python -m` does."""
    # Starting it unblocks the signal (Python 3.11), so it is started before that is blocked.
    ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
