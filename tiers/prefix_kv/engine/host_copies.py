"""Copies of blocks in the memory of the CPU. Only engines import it, since it needs numpy."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt


class HostCopies:
    """Copies between memory of ours and an engine's cache that is in the CPU's memory.

    Args:
        regions: parts of the engine's cache, each with one row of bytes for each block.
    """

    def __init__(self, regions: Sequence[npt.NDArray[np.uint8]]) -> None:
        self._regions = regions
        self.block_bytes = sum(region.shape[1] for region in regions)

    def staging(self, blocks: int) -> list[memoryview]:
        """Return memory for so many blocks, all of whose pages are there."""
        memory = np.zeros((blocks, self.block_bytes), np.uint8)
        memory.fill(1)
        return [memoryview(row) for row in memory]

    def begin_loads(self) -> None:
        """Do nothing: the engine computes in the thread that orders loads."""

    def save(self, block_id: int, into: memoryview) -> Callable[[], None]:
        """Copy a block of the engine's cache; the copy is complete at the return."""
        content, at = np.frombuffer(into, np.uint8), 0
        for region in self._regions:
            size = region.shape[1]
            np.copyto(content[at : at + size], region[block_id])
            at += size
        return _is_complete

    def load(self, content: memoryview, block_id: int) -> None:
        """Copy into a block of the engine's cache. The interpreter's lock is free meanwhile."""
        source, at = np.frombuffer(content, np.uint8), 0
        for region in self._regions:
            size = region.shape[1]
            np.copyto(region[block_id], source[at : at + size])
            at += size

    def protect(self, block_ids: Sequence[int]) -> None:
        """Do nothing, since copies are complete when `save` returns."""


def _is_complete() -> None:
    pass
