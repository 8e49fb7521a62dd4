"""What is done to the disk tier's file by hand: it is compacted, verified, or checked while in use.

Each raises `OSError` if there is no file, and those that need it alone if another process has it
open.
"""

import asyncio
import contextlib
import errno
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.disk.compaction import shrink
from tiers.disk.encryption import Cipher, EncryptionKeyError
from tiers.disk.file import DATA, OtherFormatError, check_seal
from tiers.disk.recovery import Recovery, is_clean, verifier


class Compacted(NamedTuple):
    """The size of the file, in bytes."""

    before: int
    after: int


class Verified(NamedTuple):
    """What was found in a file."""

    entries: int
    damaged: int
    """Of them, entries that don't verify."""
    problem: str | None = None
    """Why the file can't be used at all."""


def compact(folder: Path) -> Compacted:
    """Make the file in `folder` as small as its entries, having verified it if need be.

    Raises:
        OSError: there is no file, another process has it open, it can't be read, there is no room
            for a copy, or it was interrupted.
        OtherFormatError: the file has another format.
        UntrustedError: it was not closed cleanly, and can't be used.
    """
    data = folder / DATA
    before = data.stat().st_size
    with _alone(folder) as opening:
        if not opening.is_clean():
            opening.verify()
        try:
            shrink(folder)
        except lmdb.Error as exc:
            raise OSError(errno.EIO, f"LMDB can't read the file: {exc}", str(data)) from exc
        opening.mark()
        return Compacted(before, data.stat().st_size)


def verify(folder: Path, *, repair: bool = False) -> Verified:
    """Verify the pages and records of the file in `folder`; with `repair`, drop damaged entries.

    Raises:
        OSError: there is no file, another process has it open, or it was interrupted.
    """
    (folder / DATA).stat()
    with _alone(folder) as opening:
        report = opening.examine(repair=repair)
        if "problem" in report:
            return Verified(0, 0, report["problem"])
        if repair:
            opening.mark()
        return Verified(report["entries"], report["damaged"])


async def check(folder: Path) -> Verified:
    """Verify the records of a file that may be in use, in another process, and change nothing.

    Raises:
        OSError: there is no file.
    """
    (folder / DATA).stat()
    command, env = verifier(folder, "--records")
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdout=asyncio.subprocess.PIPE
    )
    try:
        said, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    try:
        return Verified(**({"entries": 0, "damaged": 0} | json.loads(said)))
    except ValueError:
        return Verified(0, 0, f"verifying it ended with status {process.returncode}")


def check_key(folder: Path, encryption_key: bytes | None) -> None:
    """Check that a `DiskCache` with this key could read the file in `folder`, if there is one.

    Nothing is touched. Of a file that is in use or wasn't closed cleanly nothing is known.

    Raises:
        SealError: it couldn't.
    """
    seal = None if encryption_key is None else Cipher(encryption_key)
    try:
        if (folder / DATA).exists() and is_clean(folder):
            check_seal(folder, seal)
    except EncryptionKeyError:
        raise
    except (OSError, lmdb.Error, OtherFormatError):
        # A server says so, or makes another.
        return


@contextmanager
def _alone(folder: Path) -> Iterator[Recovery]:
    opening = Recovery(folder, sys.maxsize, time.time, sets_aside=False)
    try:
        if not opening.try_exclusive():
            raise OSError(errno.EBUSY, "another process has the disk tier open", str(folder))
        yield opening
    finally:
        opening.release(whole=False)
