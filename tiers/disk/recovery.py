"""Who may open the disk tier's folder, and when its file is trusted.

LMDB trusts its pages: a damaged one can crash the process that reads it. So a file is opened only
after it was closed cleanly and has not changed since, which a mark beside it tells, or after
another process has verified it. A file that fails is set aside.

Every open file holds a shared lock on `in-use.lock`; who verifies, compacts or marks it holds the
exclusive one. Invariants: while a mark exists and matches, the file is whole and nobody writes it;
all who have the file open are in one PID namespace, such as one container.

LMDB knows its users by their process and thread ids. Where these aren't unique, as between
containers, two of one process id can't both read, and one that is killed while it waits for the
writer's lock frees that of another thread of the same id, which then isn't alone (the kernel's
`handle_futex_death` compares nothing but the id). So those in one namespace wait until those in
another have closed the file: whoever has it open holds a lock of the byte of `in-use.lock`, too,
whose offset is the namespace's number.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiers.disk.compaction import shrink
from tiers.disk.file import DATA, OtherFormatError
from tiers.file_locks import are_others_locked, set_lock

logger = logging.getLogger(__name__)

LOCK, MARK = "in-use.lock", "clean"

_POLL_S = 0.1
_VERIFY_S = 60.0
_VERIFY_BYTES_PER_S = 5e6
_ASK_TO_END = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip
# From the start on, SIGINT ends it without a traceback.
_VERIFY = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from tiers.disk.verify import main; sys.exit(main())"
)
_PACKAGES = Path(__file__).parents[2]


class UntrustedError(Exception):
    """The file can't be trusted, and isn't to be set aside; the text says why."""


_ELSEWHERE = (
    "its file is open in another PID namespace, such as another container, whose processes LMDB "
    "can't tell from ours; those who share a file should share a PID namespace"
)


class Recovery:
    """One process's right to open the file in `folder`.

    Args:
        folder: made, private to this user, if it isn't there.
        max_bytes: a larger file is shrunk before it is opened.
        clock: returns Unix seconds, for the names of files that are set aside.
        sets_aside: whether a file that can't be trusted gives way to a new one.

    Raises:
        OSError: the folder can't be made or written.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        clock: Callable[[], float],
        *,
        sets_aside: bool = True,
    ) -> None:
        self.folder = folder
        self._sets_aside = sets_aside
        self._max_bytes = max_bytes
        self.damaged = 0
        self.waits_for_others = False
        """Whether the file is open in another PID namespace, and so can't be in ours yet."""
        self._clock = clock
        self._data = folder / DATA
        self._mark = folder / MARK
        self._verifier: subprocess.Popen[str] | None = None
        self._cancelled = threading.Event()
        self._namespace = _namespace()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise type(exc)(
                exc.errno, f"the disk tier can't use the folder: {exc.strerror}", str(folder)
            ) from exc

    def try_now(self) -> bool:
        """Return whether the file may be opened at once."""
        is_alone, is_elsewhere = self.try_exclusive(), self._is_elsewhere()
        if is_alone and not self._is_ready():
            return False
        # A lock of ours could keep those elsewhere from being alone at their end.
        if not is_elsewhere and self._take(fcntl.LOCK_SH):
            self._set_namespace(fcntl.F_RDLCK)
            # Changing the lock lets others in between, so look again.
            if (not is_alone or self._is_ready()) and not self._is_elsewhere():
                self._mark.unlink(missing_ok=True)
                return True
        self._leave()
        return False

    def wait(self) -> None:
        """Return when the file may be opened, having verified it or set it aside if need be.

        Raises:
            InterruptedError: `cancel` was called.
            OSError: the file can't be read or renamed.
            UntrustedError: it should be set aside, and isn't to be.
        """
        try:
            is_said = False
            while not self.try_now():
                if self._cancelled.is_set():
                    raise InterruptedError("closed before the file was open")
                if self.waits_for_others and not self._sets_aside:
                    raise OSError(errno.EBUSY, _ELSEWHERE, str(self._data))
                if self.waits_for_others and not is_said:
                    is_said = True
                    logger.warning("the disk tier can't be used yet: %s", _ELSEWHERE)
                if self.try_exclusive() and not self._is_ready():
                    # If it was not us who ended the verifier, we look again.
                    with contextlib.suppress(InterruptedError):
                        self._make_ready()
                else:
                    self._cancelled.wait(_POLL_S)
        except BaseException:
            self._leave()
            raise

    def cancel(self) -> None:
        """Make `wait` give up."""
        self._cancelled.set()
        if (verifier := self._verifier) is not None:
            verifier.kill()

    def try_exclusive(self) -> bool:
        """Return whether nobody else has the file open; they can't open it then."""
        return self._take(fcntl.LOCK_EX)

    def is_clean(self) -> bool:
        """Return whether there is no file, or one that is as its last user left it."""
        return is_clean(self.folder)

    def _make_ready(self) -> None:
        if not self.is_clean():
            self.verify()
        if self._is_too_large():
            try:
                shrink(self.folder, self._max_bytes)
            except OtherFormatError as exc:
                self.set_aside(str(exc))
        self.mark()

    def _is_too_large(self) -> bool:
        return self._data.exists() and self._data.stat().st_size > self._max_bytes

    def _is_ready(self) -> bool:
        return self.is_clean() and not self._is_too_large()

    def mark(self) -> None:
        """Note that the file is whole. Needs the exclusive lock."""
        if self._data.exists():
            made = self._mark.with_suffix(".new")
            made.write_text(_identity(self._data))
            made.replace(self._mark)

    def verify(self) -> None:
        """Verify the file in another process, which drops what fails; set it aside if all does.

        Needs the exclusive lock.

        Raises:
            UntrustedError: it should be set aside, and isn't to be.
        """
        size = self._data.stat().st_size
        logger.warning("the disk tier's file was not closed cleanly; verifying %d bytes", size)
        report = self.examine(repair=True)
        if "problem" in report:
            self.set_aside(report["problem"])
            return
        self.damaged = report["damaged"]
        logger.info(
            "the disk tier's file is whole: %d entries, and %d damaged ones that were dropped",
            report["entries"],
            self.damaged,
        )

    def examine(self, *, repair: bool) -> dict[str, Any]:
        """Return what `tiers.disk.verify` says of the file, in a process of its own.

        Needs the exclusive lock; the other process holds it too.

        Raises:
            InterruptedError: `cancel` was called, or the other process was asked to end.
        """
        command, env = verifier(self.folder, *["--repair"] * repair)
        bound_s = _VERIFY_S + self._data.stat().st_size / _VERIFY_BYTES_PER_S
        with subprocess.Popen(  # noqa: S603
            command, env=env, pass_fds=[self._lock], stdout=subprocess.PIPE, text=True
        ) as self._verifier:
            try:
                said = (
                    "" if self._cancelled.is_set() else self._verifier.communicate(None, bound_s)[0]
                )
            except subprocess.TimeoutExpired:
                said = json.dumps({"problem": "verifying it took too long"})
            finally:
                self._verifier.kill()
        status = self._verifier.returncode
        if self._cancelled.is_set():
            raise InterruptedError("closed before the file was open")
        # A service manager may signal each process of a service, which proves no damage.
        if -status in _ASK_TO_END:
            raise InterruptedError("verifying the file was interrupted")
        try:
            report: dict[str, Any] = json.loads(said)
        except ValueError:
            report = {"problem": f"verifying it ended with status {status}"}
        return report

    def replace(self, problem: str) -> None:
        """Set aside the file that one was about to open, as `try_now` or `wait` allowed.

        Raises:
            OSError: another process has it open.
            UntrustedError: it isn't to be set aside.
        """
        if not self.try_exclusive():
            raise OSError(
                errno.EBUSY, f"another process has it open, and {problem}", str(self._data)
            )
        if not self._sets_aside:
            # As it was found.
            self.mark()
        self.set_aside(problem)
        if not self._take(fcntl.LOCK_SH):
            raise OSError(errno.EBUSY, "another process opened it first", str(self._data))

    def set_aside(self, problem: str) -> None:
        """Rename the file so that a new one is made; only the last such file is kept.

        Raises:
            UntrustedError: it isn't to be set aside.
        """
        if not self._sets_aside:
            raise UntrustedError(problem)
        for earlier in self.folder.glob(f"{DATA}.aside-*"):
            earlier.unlink()
        aside = self.folder / f"{DATA}.aside-{int(self._clock())}"
        self._mark.unlink(missing_ok=True)
        self._data.rename(aside)
        logger.warning(
            "the disk tier starts empty: %s; the file is set aside as %s", problem, aside
        )

    def release(self, *, whole: bool) -> None:
        """Give up the lock once the file is closed; `whole` if nothing in it has failed."""
        # Without a mark, on a full disk for instance, the next start verifies.
        with contextlib.suppress(OSError):
            if whole and self.try_exclusive():
                self.mark()
        os.close(self._lock)

    def _is_elsewhere(self) -> bool:
        """Return whether somebody in another PID namespace has the file open."""
        with contextlib.suppress(OSError):
            self.waits_for_others = are_others_locked(self._lock, self._namespace)
        return self.waits_for_others

    def _set_namespace(self, kind: int) -> None:
        # Where there are no such locks, others can't be told apart.
        with contextlib.suppress(OSError):
            set_lock(self._lock, kind, self._namespace)

    def _leave(self) -> None:
        self._set_namespace(fcntl.F_UNLCK)
        self._take(fcntl.LOCK_UN)

    def _take(self, operation: int) -> bool:
        try:
            fcntl.flock(self._lock, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _namespace() -> int:
    """Return the number of the PID namespace that we are in; 0 where that can't be told."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def is_clean(folder: Path) -> bool:
    """Return whether there is no file in `folder`, or one that is as its last user left it."""
    data, mark = folder / DATA, None
    with contextlib.suppress(OSError):
        mark = (folder / MARK).read_text()
    return not data.exists() or mark == _identity(data)


def _identity(data: Path) -> str:
    found = data.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def verifier(folder: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that verifies the file in `folder`, and its environment."""
    command = [sys.executable, "-c", _VERIFY, *options, str(folder)]
    return command, os.environ | {"PYTHONPATH": str(_PACKAGES)}
