"""The data file: the bytes of prefix blocks, in pages that the index hands out.

It is read and written by calls that release the interpreter's lock, not by a map: a truncated file
is then an error and no SIGBUS, and a slow disk holds up one thread. The page cache keeps what is
read often in memory.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tiers.encryption import TAG_BYTES, Cipher, check, checksum
from tiers.prefix_kv.index.extents import Extent

PAGE_BYTES = 4096
DATA = "blocks.bin"


def overhead_bytes(cipher: Cipher | None) -> int:
    """Return the bytes that each block takes beyond its own: an encrypted one has a tag."""
    return 0 if cipher is None else TAG_BYTES


class DamagedBlockError(Exception):
    """The bytes in the file aren't those that were stored."""


class DataFile:
    """An open data file. Several threads may read, and one may write.

    Args:
        folder: holds the file, which is made if it is missing.
        cipher: encrypts blocks; `None` if they only get a checksum.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, folder: Path, cipher: Cipher | None) -> None:
        self._cipher = cipher
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(folder / DATA, flags, 0o600)

    def close(self) -> None:
        """Close the file; no other thread may use it any more."""
        os.close(self._file)

    def size(self) -> int:
        """Return the bytes that the file takes."""
        return os.fstat(self._file).st_size

    def truncate(self, pages: int) -> None:
        """Cut off what is behind these pages."""
        if self.size() > pages * PAGE_BYTES:
            os.ftruncate(self._file, pages * PAGE_BYTES)

    def write(
        self, extents: Sequence[Extent], sequence: int, block: memoryview, scratch: memoryview
    ) -> bytes:
        """Write a block; returns its tag.

        Args:
            extents: pages for it.
            sequence: its number, which no other block has.
            block: its bytes.
            scratch: of the same size and `TAG_BYTES` more.

        Raises:
            OSError: the disk is full, or fails.
        """
        if self._cipher is None:
            self._write(extents, block)
            return checksum(sequence, block)
        self._cipher.encrypt_large(sequence, block, scratch)
        self._write(extents, scratch)
        return bytes(TAG_BYTES)

    def read(
        self,
        extents: Sequence[Extent],
        sequence: int,
        tag: bytes,
        block: memoryview,
        scratch: memoryview,
    ) -> None:
        """Read a block into `block`, and verify it.

        Raises:
            DamagedBlockError: these pages don't hold what was written under that number.
            OSError: the disk fails.
        """
        try:
            if self._cipher is None:
                self._read(extents, block)
                check(sequence, block, tag)
            else:
                self._read(extents, scratch)
                self._cipher.decrypt_large(sequence, scratch, block)
        except ValueError as exc:
            raise DamagedBlockError(str(exc)) from exc

    def copy(self, source: Sequence[Extent], target: Sequence[Extent], buffer: memoryview) -> None:
        """Copy a block's bytes to other pages, as they are.

        Args:
            source: its pages.
            target: as many.
            buffer: of the size that it takes in the file.

        Raises:
            OSError: the disk is full, or fails.
        """
        # What the file lacks is found when the block is read.
        with suppress(ValueError):
            self._read(source, buffer)
        self._write(target, buffer)

    def _write(self, extents: Sequence[Extent], data: memoryview) -> None:
        for offset, part in _parts(extents, data):
            done = 0
            while done < len(part):
                done += os.pwrite(self._file, part[done:], offset + done)

    def _read(self, extents: Sequence[Extent], data: memoryview) -> None:
        for offset, part in _parts(extents, data):
            done = 0
            while done < len(part):
                read = os.preadv(self._file, [part[done:]], offset + done)
                if not read:
                    raise ValueError("the file ends before the block")
                done += read


def _parts(extents: Sequence[Extent], data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield offsets in the file, and the parts of `data` that are there."""
    at = 0
    for first, pages in extents:
        part = data[at : at + pages * PAGE_BYTES]
        at += len(part)
        yield first * PAGE_BYTES, part
    if at < len(data):
        raise ValueError("there are too few pages for the block")
