"""The guard, as a real process around small programs."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., subprocess.Popen[bytes]]
WAITS = "print('on', flush=True); signal.pause()"
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
CLEANS_UP = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); "
LEAVES_ONE = f"""
if os.fork() == 0:
    {IGNORES}{WAITS}
os._exit(4)
"""
MAIN = ("-m", "server.guard")
AT_ONCE = "import sys; from server import guard; guard._GRACE_S = 0; sys.exit(guard.main())"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a guard of a Python script, as the engine does."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "engine.sock").touch()
    started = []

    def starts(script: str, *, main: tuple[str, ...] = MAIN) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "import os, signal, sys\n" + script]
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
    for process in started:
        with process:
            process.stdin.close()
    assert not folder.exists()


def end(guard: subprocess.Popen[bytes], how: str) -> None:
    if how == "stdin":
        guard.stdin.close()
    else:
        guard.terminate()


def ended(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status, once all that hold the output have ended."""
    said = process.stdout.read()
    process.wait(60)
    assert b"Fatal Python error" not in said
    assert b"Traceback" not in said
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


@pytest.mark.parametrize(("script", "status"), [(WAITS, 128 + 15), (CLEANS_UP + WAITS, 5)])
@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
def test_the_command_is_asked_to_end(start: Start, script: str, status: int, how: str) -> None:
    guard = start(script)
    assert guard.stdout.readline() == b"on\n"
    end(guard, how)
    assert ended(guard) == status


@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
def test_a_command_that_does_not_end_is_killed(start: Start, how: str) -> None:
    guard = start(IGNORES + WAITS, main=("-c", AT_ONCE))
    assert guard.stdout.readline() == b"on\n"
    end(guard, how)
    assert ended(guard) == 128 + 9


def test_what_the_command_left_behind_is_killed(start: Start) -> None:
    guard = start(LEAVES_ONE)
    # The output ends only when the one that was left has ended too.
    assert ended(guard) == 4
