"""Which process may open the disk tier's file, and when.

A file that its marks trust is opened at once, also after a kill. Any other is verified first by
another process, which drops damaged entries; a file that can't be used is quarantined.

A process that has the file open holds a shared lock on `in-use.lock`; one that verifies, compacts
or marks it holds the exclusive lock. Invariants: while the mark `clean` describes the file, it is
whole and no process writes it; all processes that have it open are in one PID namespace, such as
one container.

LMDB knows its users by their process and thread ids. Where these aren't unique, as between
containers, two of one process id can't both read, and one that is killed while it waits for the
writer's lock frees that of another thread of the same id, which then isn't alone (the kernel's
`handle_futex_death` compares nothing but the id). So processes in one namespace wait until those in
another have closed the file: a process that has it open also locks the byte of `in-use.lock` whose
offset is the namespace's number.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tiers.disk.compaction import shrink
from tiers.disk.file import DATA, OtherFormatError
from tiers.disk.marks import Marks
from tiers.disk.verify import VerifyReport, command, read_report
from tiers.file_locks import are_others_locked, set_lock

logger = logging.getLogger(__name__)

LOCK = "in-use.lock"

_POLL_S = 0.1
# Of CPU time: damage may have it loop, but a disk or a machine that stands still is no damage.
_VERIFY_S = 60.0
_VERIFY_BYTES_PER_S = 5e6
_END_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip


class UntrustedError(Exception):
    """The file can't be used, and isn't to be quarantined; the text is the reason."""


_ELSEWHERE = (
    "its file is open in another PID namespace, such as another container, whose processes LMDB "
    "can't distinguish from ours; processes that share a file should share a PID namespace"
)


class Recovery:
    """One process's right to open the file in `folder`.

    Args:
        folder: made, private to this user, if it isn't there.
        max_bytes: the first `max_bytes`.
        clock: returns Unix seconds, for the names of quarantined files.
        quarantines: whether a file that can't be used gives way to a new one.

    Raises:
        OSError: the folder can't be made or written.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        clock: Callable[[], float],
        *,
        quarantines: bool = True,
    ) -> None:
        self.folder = folder
        self._quarantines = quarantines
        self.max_bytes = max_bytes
        """A larger file is shrunk before it is opened."""
        self.damaged = 0
        """How many damaged entries were dropped when the file was verified."""
        self.waits_for_others = False
        """Whether the file is open in another PID namespace, and so can't be in ours yet."""
        self._clock = clock
        self._data = folder / DATA
        self.marks = Marks(folder)
        self._is_distrusted = False
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

    def try_open(self) -> bool:
        """Return whether the file may be opened at once; `Marks.mark_open` has to follow."""
        is_alone, is_elsewhere = self.try_exclusive(), self._is_elsewhere()
        if is_alone and not self._is_ready():
            return False
        # Our lock could keep processes elsewhere from being alone when they close the file.
        if not is_elsewhere and self._take(fcntl.LOCK_SH):
            self._set_namespace(fcntl.F_RDLCK)
            # While the lock changes, another process can open the file, so look again.
            if (not is_alone or self._is_ready()) and not self._is_elsewhere():
                if is_alone:
                    self.marks.mark_death()
                return True
        self._leave()
        return False

    def wait(self) -> None:
        """Return when the file may be opened, having verified or quarantined it if need be.

        Raises:
            InterruptedError: `cancel` was called.
            OSError: the file can't be read or renamed.
            UntrustedError: it can't be used, and isn't to be quarantined.
        """
        try:
            is_logged = False
            while not self.try_open():
                if self._cancelled.is_set():
                    raise InterruptedError("closed before the file was open")
                if self.waits_for_others and not self._quarantines:
                    raise OSError(errno.EBUSY, _ELSEWHERE, str(self._data))
                if self.waits_for_others and not is_logged:
                    is_logged = True
                    logger.warning("the disk tier can't be used yet: %s", _ELSEWHERE)
                if self.try_exclusive() and not self._is_ready():
                    # Look again if the verifier was ended by something else than `cancel`.
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
        """Return whether no other process has the file open; none can open it then."""
        return self._take(fcntl.LOCK_EX)

    def verify_and_repair(self) -> None:
        """Verify the file in another process, which drops damaged entries, or quarantine it.

        Needs the exclusive lock.

        Raises:
            UntrustedError: it can't be used, and isn't to be quarantined.
        """
        size = self._data.stat().st_size
        logger.warning("the disk tier's file may be damaged; verifying %d bytes", size)
        report = self.verify(repair=True)
        if report.problem is not None:
            self.quarantine(report.problem)
            return
        self.damaged = report.damaged
        logger.info(
            "the disk tier's file is whole: %d entries, and %d damaged ones that were dropped",
            report.entries,
            self.damaged,
        )

    def verify(self, *, repair: bool) -> VerifyReport:
        """Verify the file in another process. Needs the exclusive lock, which that holds too.

        Raises:
            InterruptedError: `cancel` was called, or the other process was asked to end.
        """
        words, env = command(self.folder, *["--repair"] * repair)
        bound_s = int(_VERIFY_S + self._data.stat().st_size / _VERIFY_BYTES_PER_S)
        output = ""
        with subprocess.Popen(  # noqa: S603
            words, env=env, pass_fds=[self._lock], stdout=subprocess.PIPE, text=True
        ) as self._verifier:
            try:
                _, most_s = resource.prlimit(self._verifier.pid, resource.RLIMIT_CPU)
                resource.prlimit(self._verifier.pid, resource.RLIMIT_CPU, (bound_s, most_s))
                if not self._cancelled.is_set():
                    output, _ = self._verifier.communicate()
            finally:
                self._verifier.kill()
        status = self._verifier.returncode
        if self._cancelled.is_set():
            raise InterruptedError("closed before the file was open")
        # A service manager may signal each process of a service; that isn't damage.
        if -status in _END_SIGNALS:
            raise InterruptedError("verifying the file was interrupted")
        if -status == signal.SIGXCPU:
            return VerifyReport(0, 0, f"verifying it took {bound_s} s of CPU")
        return read_report(output, status)

    def replace(self, problem: str) -> None:
        """Quarantine the file that one was about to open, as `try_open` or `wait` allowed.

        Raises:
            OSError: another process has it open.
            UntrustedError: it isn't to be quarantined.
        """
        if not self.try_exclusive():
            raise OSError(
                errno.EBUSY, f"another process has it open, and {problem}", str(self._data)
            )
        self.quarantine(problem)
        if not self._take(fcntl.LOCK_SH):
            raise OSError(errno.EBUSY, "another process opened it first", str(self._data))

    def quarantine(self, problem: str) -> None:
        """Rename the file so that a new one is made; only the last such file is kept.

        Raises:
            UntrustedError: it isn't to be quarantined.
        """
        if not self._quarantines:
            raise UntrustedError(problem)
        for earlier in self.folder.glob(f"{DATA}.aside-*"):
            earlier.unlink()
        aside = self.folder / f"{DATA}.aside-{int(self._clock())}"
        self.marks.clear()
        self._data.rename(aside)
        logger.warning(
            "the disk tier starts empty: %s; the file is quarantined as %s", problem, aside
        )

    def distrust(self) -> None:
        """Have the file verified when it is opened next, since it looks damaged."""
        if not self._is_distrusted:
            self._is_distrusted = True
            self.marks.mark_damaged()

    def release(self, *, closed: bool) -> None:
        """Give up the lock, and mark the file clean if it was synced and `closed`."""
        # Without the mark, as on a full disk, the file counts as left by a kill.
        with contextlib.suppress(OSError):
            is_whole = closed and not self._is_distrusted and not self.marks.is_damaged()
            if is_whole and self.try_exclusive():
                self.marks.mark_clean()
        os.close(self._lock)

    def _make_ready(self) -> None:
        if not self.marks.is_trusted():
            self.verify_and_repair()
        if self._is_too_large():
            try:
                shrink(self.folder, self.max_bytes)
            except OtherFormatError as exc:
                self.quarantine(str(exc))
        self.marks.mark_clean()

    def _is_too_large(self) -> bool:
        return self._data.exists() and self._data.stat().st_size > self.max_bytes

    def _is_ready(self) -> bool:
        return self.marks.is_trusted() and not self._is_too_large()

    def _is_elsewhere(self) -> bool:
        """Return whether a process in another PID namespace has the file open."""
        with contextlib.suppress(OSError):
            self.waits_for_others = are_others_locked(self._lock, self._namespace)
        return self.waits_for_others

    def _set_namespace(self, kind: int) -> None:
        # Where the system has no such locks, namespaces aren't noticed.
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
    """Return the number of the PID namespace that we are in, or 0 where it isn't known."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
