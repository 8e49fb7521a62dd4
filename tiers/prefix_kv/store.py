"""The store of prefix blocks: index and data file of a folder, for all engines that share it.

It knows nothing of engines. What it owns: a block is published only once its bytes are written;
what is found damaged is removed; a folder that can't be used is replaced where nothing of value is
lost, since every block can be computed again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.prefix_kv.data_file import DamagedBlockError, DataFile
from tiers.prefix_kv.folder import Folder
from tiers.prefix_kv.index.extents import Extent
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.index.index_file import (
    FileLimits,
    ForeignIndexError,
    OtherVersionError,
    has_only_data,
    remove_files,
    why_not_usable,
)
from tiers.prefix_kv.index.transaction import NewBlock, Reservation
from tiers.prefix_kv.record import StoredBlock

logger = logging.getLogger(__name__)

MIN_BYTES = 64 * 1024**2
"""The smallest limit: the index takes 8 MiB of it."""


class StoreStatistics(NamedTuple):
    """A store in numbers."""

    blocks: int
    block_bytes: int
    file_bytes: int
    """Of both files."""
    free_bytes: int
    """Of pages that no block takes."""


class Stored(NamedTuple):
    """What became of blocks that were to be stored."""

    stored: int
    evicted: int
    """Blocks that gave way."""


class Location(NamedTuple):
    """Where a stored block is: all that reading it takes, so that a reader needs no index."""

    key: bytes
    sequence: int
    size: int
    tag: bytes
    extents: tuple[Extent, ...]

    @classmethod
    def of(cls, block: StoredBlock) -> "Location":
        """Return the location of a block."""
        return cls(block.key, block.sequence, block.size, block.tag, block.extents)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How a store is opened; all engines that share a folder should agree."""

    folder: Path
    max_bytes: int
    key: bytes | None = None
    """Encrypts blocks and what names them."""
    ttl_s: float = 7 * 86400
    syncs: bool = True
    """Whether a write of the index waits until it is on disk."""


class PrefixStore:
    """An open store.

    Args:
        config: where it is.
        clock: returns Unix seconds.
        limits: of its files; they follow from `config` if none are given.

    Raises:
        ForeignIndexError: the folder has another program's file.
        EncryptionKeyError: the folder's blocks are encrypted otherwise.
        lmdb.Error: the index can't be opened.
        OSError: the folder can't be used, or another process doesn't give up its lock.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] = time.time,
        *,
        limits: FileLimits | None = None,
    ) -> None:
        self.config, self._clock = config, clock
        self._limits = limits or FileLimits.of(config.max_bytes)
        self._lost: list[Reservation] = []
        config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = Folder(config.folder)
        try:
            # Index and data file belong together, so nobody may replace them in between.
            with self.folder.writing():
                self.folder.join()
                self.index = self._open_index()
                self.folder.mark_ours()
                self.data = DataFile(config.folder, self.index.cipher)
                self.data.truncate(self._limits.data_pages)
            # A process that ends by itself isn't counted as one that the index has killed.
            self._at_exit = Finalize(None, self.folder.mark_end, exitpriority=0)
        except BaseException:
            self.folder.leave()
            raise

    def _open_index(self) -> PrefixIndex:
        folder = self.folder
        why = why_not_usable(folder, self._limits)
        is_ours = folder.is_ours or (why is None and not has_only_data(folder.path))
        if why is None and is_ours:
            try:
                return self._open()
            except (
                ForeignIndexError, lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError,
            ) as exc:  # fmt: skip
                # Of an index that we have made, what names it may be damaged.
                why, is_ours = str(exc), folder.is_ours
            except OtherVersionError as exc:
                why = str(exc)
        if not is_ours:
            raise ForeignIndexError(
                f"{folder.path} has files of another program: {why or 'there is no index'}"
            )
        logger.warning("the prefix blocks in %s are begun anew: %s", folder.path, why)
        remove_files(folder.path)
        folder.mark_whole()
        return self._open()

    def _open(self) -> PrefixIndex:
        return PrefixIndex(
            self.folder, self._limits, key=self.config.key, ttl_s=self.config.ttl_s,
            clock=self._clock, syncs=self.config.syncs,
        )  # fmt: skip

    def close(self) -> None:
        """Close the files; no other thread may use the store any more."""
        self._at_exit.cancel()
        self.index.close()
        self.data.close()
        self.folder.leave()

    @property
    def limit_pages(self) -> int:
        """Pages that the data file may have."""
        return self._limits.data_pages

    def write(self, blocks: Sequence[tuple[NewBlock, memoryview]], scratch: memoryview) -> Stored:
        """Store blocks that aren't stored yet, and evict others for them.

        A block that follows one that isn't stored isn't stored either.

        Args:
            blocks: with their bytes, a chain's in order.
            scratch: of the largest block's size and `TAG_BYTES` more.

        Raises:
            lmdb.Error: the index can't be written.
            OSError: the disk is full, or fails.
        """
        contents = {id(new): content for new, content in blocks}
        if self._lost:
            self._give_back(self._lost)
        reserved, evicted = self.index.reserve([new for new, _ in blocks])
        if not reserved:
            return Stored(0, evicted)
        written = []
        try:
            for each in reserved:
                content = contents[id(each.block)]
                sealed = scratch[: len(content) + self.index.overhead_bytes]
                tag = self.data.write(each.extents, each.sequence, content, sealed)
                written.append((each, tag))
            return Stored(self.index.publish(written), evicted)
        except BaseException:
            with suppress(lmdb.Error, OSError):
                self._give_back(reserved)
            raise

    def _give_back(self, reserved: list[Reservation]) -> None:
        """Give pages back; if that fails as well, the next `write` tries it first."""
        self._lost = reserved
        self.index.cancel(reserved)
        self._lost = []

    def read(self, at: Location, block: memoryview, scratch: memoryview) -> None:
        """Read a block into `block`, which has its size.

        Raises:
            DamagedBlockError: it is damaged, or another block has taken its place.
            OSError: the disk fails.
        """
        sealed = scratch[: at.size + self.index.overhead_bytes]
        self.data.read(at.extents, at.sequence, at.tag, block, sealed)

    def discard(self, at: Location) -> bool:
        """Remove a block that was found damaged. Returns whether it was still there."""
        return self.index.remove(at.key, at.sequence, at.extents)

    def statistics(self) -> StoreStatistics:
        """Count blocks and bytes."""
        index = self.index.statistics()
        return StoreStatistics(
            index.blocks, index.block_bytes, index.index_bytes + self.data.size(), index.free_bytes
        )


__all__ = [
    "MIN_BYTES",
    "DamagedBlockError",
    "ForeignIndexError",
    "Location",
    "PrefixStore",
    "StoreConfig",
    "StoreStatistics",
    "Stored",
]
