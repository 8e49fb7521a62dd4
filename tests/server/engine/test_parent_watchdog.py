"""The watchdog and the signal shield, as real processes around small programs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import HANGS_S

MAIN = ("-m", "server.engine.parent_watchdog")
Start = Callable[..., subprocess.Popen[bytes]]
WAITS = "print('on', flush=True); signal.pause()"
STOPS = "signal.signal(signal.SIGRTMIN, signal.SIG_DFL); "
IGNORES = "signal.signal(signal.SIGRTMIN, signal.SIG_IGN); "
CLEANS_UP = "signal.signal(signal.SIGRTMIN, lambda *_: sys.exit(5)); "
# The system queues this signal, but Python's handlers would run once for two that come together.
STOPS_AT_THE_SECOND = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
print('on', flush=True)
for _ in range(2): signal.sigwait({signal.SIGRTMIN})
sys.exit(5)
"""
LEAVES_ONE = f"""
if os.fork() == 0:
    {IGNORES}{WAITS}
os._exit(4)
"""
# As `systemctl stop` and `systemctl kill` may send to each process of a service.
TO_ALL = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
SHIELDED = """
import contextlib, multiprocessing, os, signal, sys

def go_on(connection):
    connection.send("on")
    # Its parent may end before it is killed.
    with contextlib.suppress(EOFError):
        connection.recv()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    signal.signal(signal.SIGINT, lambda *_: os._exit(6 if child.is_alive() else 8))
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context(sys.argv[1]).Process(target=go_on, args=[theirs])
    child.start()
    print(ours.recv(), flush=True)
    while True:
        signal.pause()
"""


def killing_after(seconds: float) -> tuple[str, ...]:
    """Return Python's arguments for a watchdog that gives its command so long to end."""
    return "-c", (
        "import sys; from server.engine import parent_watchdog; "
        f"parent_watchdog._KILL_AFTER_S = {seconds}; sys.exit(parent_watchdog.main())"
    )


PATIENT = killing_after(HANGS_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a watchdog of a Python script, as the engine does."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "engine.sock").touch()
    started = []

    def starts(
        script: str, *, main: tuple[str, ...] = MAIN, command: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        command = command or (sys.executable, "-c", "import os, signal, sys\n" + script)
        process = subprocess.Popen(
            [sys.executable, *main, str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield starts
    # It is the parent's for as long as there is one.
    is_parents = not any(process.stdin.closed for process in started)
    for process in started:
        with process:
            process.stdin.close()
    assert folder.exists() is is_parents


def ended(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status, once all that hold the output have ended."""
    output = process.stdout.read()
    process.wait(HANGS_S)
    assert b"Fatal Python error" not in output
    assert b"Traceback" not in output
    return process.returncode


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        # Our standard input is not the command's.
        ("sys.exit(len(sys.stdin.read()))", 0),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + 15),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
    ],
)
def test_the_commands_status_is_passed_on(start: Start, script: str, status: int) -> None:
    assert ended(start(script)) == status


@pytest.mark.parametrize(
    ("script", "status"),
    [(STOPS + WAITS, 128 + signal.SIGRTMIN), (CLEANS_UP + WAITS, 5), (STOPS_AT_THE_SECOND, 5)],
)
def test_the_command_is_asked_to_end(start: Start, script: str, status: int) -> None:
    watchdog = start(script, main=PATIENT)
    assert watchdog.stdout.readline() == b"on\n"
    watchdog.stdin.close()
    assert ended(watchdog) == status


def test_a_command_that_does_not_end_is_killed(start: Start) -> None:
    watchdog = start(IGNORES + WAITS, main=killing_after(0))
    assert watchdog.stdout.readline() == b"on\n"
    watchdog.stdin.close()
    assert ended(watchdog) == 128 + 9


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_signal_to_all_ends_none(start: Start, tmp_path: Path, monkeypatch, method: str) -> None:
    (tmp_path / "shielded_program.py").write_text(SHIELDED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = (sys.executable, "-m", "server.engine.signal_shield", "shielded_program", method)
    watchdog = start("", main=PATIENT, command=command)
    assert watchdog.stdout.readline() == b"on\n"
    for number in TO_ALL:
        os.killpg(watchdog.pid, number)
    watchdog.stdin.close()
    assert ended(watchdog) == 6


def test_what_the_command_left_behind_is_killed(start: Start) -> None:
    watchdog = start(LEAVES_ONE)
    # The output ends only when the one that was left has ended too.
    assert ended(watchdog) == 4
