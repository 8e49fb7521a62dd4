"""Runs a module that only `STOP_SIGNAL` stops: `python -m server.engine.signal_shield MODULE …`.

A service manager such as systemd sends SIGTERM, or SIGINT, to each process of a service at once.
vLLM would abort its requests, while we let running answers end. So both signals are blocked,
whatever handlers vLLM installs, and its child processes inherit that. `STOP_SIGNAL` runs vLLM's
handler of SIGINT. So only our watchdog makes vLLM abort its requests. vLLM stops its own
child processes by SIGTERM, which is blocked, and kills them after a time.
"""

import _thread
import runpy
import signal
import sys
from multiprocessing.resource_tracker import ensure_running

STOP_SIGNAL = signal.SIGRTMIN
"""Neither service managers nor terminals send it."""


def main() -> None:
    """Run the module that the arguments name, as `python -m` does."""
    # Starting the tracker unblocks both signals (Python 3.11), so it starts first.
    ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    signal.signal(STOP_SIGNAL, lambda *_: _thread.interrupt_main())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
