"""Maintenance of the disk tier's file: compaction, verification, and a check of its key.

`compact` and the two verifications raise `OSError` if there is no file; `compact` and `verify` also
if another process has it open.
"""

import asyncio
import contextlib
import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.disk.compaction import shrink
from tiers.disk.file import DATA, OtherFormatError, check_encryption
from tiers.disk.marks import Marks
from tiers.disk.recovery import Recovery
from tiers.disk.verify import VerifyReport, command, read_report
from tiers.encryption import Cipher, EncryptionKeyError


class Compacted(NamedTuple):
    """The size of the file, in bytes."""

    before: int
    after: int


def compact(folder: Path) -> Compacted:
    """Make the file in `folder` as small as its entries, having verified it if need be.

    Raises:
        OSError: there is no file, another process has it open, it can't be read, there is no room
            for a copy, or it was interrupted.
        OtherFormatError: the file has another format.
        UntrustedError: it may be damaged, and can't be used.
    """
    data = folder / DATA
    before = data.stat().st_size
    with _exclusively(folder) as recovery:
        if not recovery.marks.is_trusted():
            recovery.verify_and_repair()
        try:
            shrink(folder)
        except lmdb.Error as exc:
            raise OSError(errno.EIO, f"LMDB can't read the file: {exc}", str(data)) from exc
        recovery.marks.mark_clean()
        return Compacted(before, data.stat().st_size)


def verify(folder: Path, *, repair: bool = False) -> VerifyReport:
    """Verify the pages and records of the file in `folder`; with `repair`, drop damaged entries.

    Raises:
        OSError: there is no file, another process has it open, or it was interrupted.
    """
    (folder / DATA).stat()
    with _exclusively(folder) as recovery:
        report = recovery.verify(repair=repair)
        if repair and report.problem is None:
            recovery.marks.mark_clean()
        return report


async def verify_in_use(folder: Path) -> VerifyReport:
    """Verify the records of a file that may be in use, in another process, and change nothing.

    Raises:
        OSError: there is no file.
    """
    (folder / DATA).stat()
    words, env = command(folder, "--records")
    process = await asyncio.create_subprocess_exec(*words, env=env, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return read_report(output, process.returncode)


def check_key(folder: Path, encryption_key: bytes | None) -> None:
    """Check that a `DiskCache` with this key could read the file in `folder`, if there is one.

    Nothing is touched. A file that is in use, or was left by a kill, isn't checked.

    Raises:
        EncryptionKeyError: it couldn't.
    """
    cipher = None if encryption_key is None else Cipher(encryption_key)
    try:
        if (folder / DATA).exists() and Marks(folder).is_clean():
            check_encryption(folder, cipher)
    except EncryptionKeyError:
        raise
    except (OSError, lmdb.Error, OtherFormatError):
        # A server logs that, or makes another file.
        return


@contextmanager
def _exclusively(folder: Path) -> Iterator[Recovery]:
    recovery = Recovery(folder, sys.maxsize, time.time, quarantines=False)
    try:
        if not recovery.try_exclusive():
            raise OSError(errno.EBUSY, "another process has the disk tier open", str(folder))
        yield recovery
    finally:
        recovery.release(closed=False)
