"""The marks beside the disk tier's file: they decide whether it may be opened without verifying it.

LMDB commits by shadow pages, so a process that dies at any moment leaves the file whole. With
`MDB_NOSYNC` a crash of the system may damage it; without, it never does (LMDB's documentation of
`mdb_env_open`). So a file is trusted if the mark `clean` describes it as it is, or if `in-use`
records that it was opened, that commits not synced, if any, were made since this boot, and that
nothing looked like damage.

A file that was copied to here isn't trusted, since the copy may have been made during a commit; nor
is a file shorter than its pages, since a read beyond its end kills the process by SIGBUS. Of a
damaged file a process may die by other signals, too, as often as it is started. So a file isn't
trusted any more once `MAX_DEATHS` processes in a row haven't closed it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tiers.disk.file import DATA
from tiers.lmdb_pages import holds_all_pages

CLEAN, IN_USE = "clean", "in-use"
_FILE, _UNSYNCED, _DAMAGED, _DEATH = "file", "unsynced", "damaged", "death"
MAX_DEATHS = 3
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Marks:
    """The marks in a folder. Processes that share a file append lines to `in-use` concurrently.

    Args:
        folder: holds the file, if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._data = folder / DATA
        self._clean = folder / CLEAN
        self._in_use = folder / IN_USE

    def is_clean(self) -> bool:
        """Return whether there is no file, or one that is as its last user left it."""
        mark = None
        with contextlib.suppress(OSError):
            mark = self._clean.read_text()
        return not self._data.exists() or mark == _identity(self._data)

    def is_trusted(self) -> bool:
        """Return whether the file may be opened as it is. Needs the exclusive lock."""
        if self.is_clean():
            return True
        lines, boot_id = self._lines(), _boot_id()
        known = (f"{_FILE} ", f"{_DEATH} ")
        return (
            self._file_line() in lines
            and all(line.startswith(known) or _is_of(line, boot_id) for line in lines)
            and _deaths(lines) < MAX_DEATHS - 1
            and holds_all_pages(self._data)
        )

    def mark_death(self) -> None:
        """Note that the process that had the file open last has died, if one has.

        Needs that no other process has opened the file since.
        """
        if not self.is_clean():
            with self._or_without():
                self._append(f"{_DEATH} {_deaths(self._lines()) + 1}")

    def mark_open(self, *, syncs: bool) -> None:
        """Note that the file is open, and whether commits are synced; before the first of them.

        Where there is no room for the mark, the file is verified unless it is closed cleanly.
        """
        with self._or_without():
            unsynced = [] if syncs else [f"{_UNSYNCED} {_boot_id()}"]
            self._append(self._file_line(), *unsynced)
            self._clean.unlink(missing_ok=True)
            sync_folder(self._data.parent)

    def mark_clean(self) -> None:
        """Note that the file is whole, synced and closed. Needs the exclusive lock."""
        if self._data.exists():
            made = self._clean.with_suffix(".new")
            made.write_text(_identity(self._data))
            made.replace(self._clean)
            self._in_use.unlink(missing_ok=True)

    def mark_damaged(self) -> None:
        """Have the file verified when it is opened next, even if it is closed cleanly."""
        with self._or_without():
            self._append(_DAMAGED)
            self._clean.unlink(missing_ok=True)

    def is_damaged(self) -> bool:
        """Return whether `mark_damaged` was called, in any process."""
        return _DAMAGED in self._lines()

    def clear(self) -> None:
        """Remove all marks, so that the file isn't trusted."""
        self._clean.unlink(missing_ok=True)
        self._in_use.unlink(missing_ok=True)

    def _file_line(self) -> str:
        return f"{_FILE} {self._data.stat().st_ino}"

    def _lines(self) -> list[str]:
        with contextlib.suppress(OSError):
            return self._in_use.read_text(errors="replace").splitlines()
        return []

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        """Remove the marks where they can't be written."""
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError):
                self.clear()

    def _append(self, *lines: str) -> None:
        held = self._lines()
        text = "".join(f"{line}\n" for line in lines if line not in held)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file = os.open(self._in_use, flags, 0o600)
        try:
            # So short a text is appended as a whole.
            os.write(file, text.encode())
            os.fsync(file)
        finally:
            os.close(file)


def _deaths(lines: list[str]) -> int:
    return sum(line.startswith(_DEATH) for line in lines)


def _is_of(line: str, boot_id: str) -> bool:
    return bool(boot_id) and line == f"{_UNSYNCED} {boot_id}"


def sync_folder(folder: Path) -> None:
    """Sync a folder's list of files to the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _identity(data: Path) -> str:
    found = data.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _boot_id() -> str:
    """Return the id of this boot of the system, or `""` where it isn't known."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""
