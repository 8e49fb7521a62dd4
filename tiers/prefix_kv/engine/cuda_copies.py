"""Copies of blocks between a GPU and pinned memory, beside the engine's computing.

Written against PyTorch's documentation of CUDA semantics (streams, events, pinned memory) and
vLLM's `v1/simple_kv_offload`. Two streams of low priority copy; the engine's stream only ever waits
for a copy out of a block that it is about to overwrite, and no thread of the engine waits for any.
"""

from collections.abc import Callable, Sequence

import torch

_MAX_IN_FLIGHT = 1024
"""Events of saves that are remembered before those that are over are forgotten."""


class CudaCopies:
    """Copies between pinned memory and an engine's cache on a GPU.

    Args:
        regions: parts of the engine's cache, each with one row of bytes for each block.
    """

    def __init__(self, regions: Sequence[torch.Tensor]) -> None:
        self._regions, self._device = regions, regions[0].device
        self.block_bytes = sum(region.shape[1] for region in regions)
        low, _ = torch.cuda.Stream.priority_range()
        self._loads = torch.cuda.Stream(self._device, priority=low)
        self._saves = torch.cuda.Stream(self._device, priority=low)
        self._in_flight: dict[int, torch.cuda.Event] = {}

    def staging(self, blocks: int) -> list[memoryview]:
        """Return pinned memory for so many blocks."""
        pinned = torch.empty((blocks, self.block_bytes), dtype=torch.uint8, pin_memory=True)
        return [memoryview(row) for row in pinned.numpy()]

    def begin_loads(self) -> None:
        """Have loads wait for what has been ordered until now, and may use their blocks.

        That is the engine's computing, and saves of blocks that it has freed since.
        """
        self._loads.wait_stream(torch.cuda.current_stream(self._device))
        self._loads.wait_stream(self._saves)

    def save(self, block_id: int, into: memoryview) -> Callable[[], None]:
        """Begin to copy a block, after what the engine has ordered until now."""
        computed, copied = torch.cuda.Event(), torch.cuda.Event(blocking=True)
        computed.record(torch.cuda.current_stream(self._device))
        self._saves.wait_event(computed)
        content, at = torch.frombuffer(into, dtype=torch.uint8), 0
        with torch.cuda.stream(self._saves):
            for region in self._regions:
                size = region.shape[1]
                content[at : at + size].copy_(region[block_id], non_blocking=True)
                at += size
        copied.record(self._saves)
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._in_flight = {at: each for at, each in self._in_flight.items() if not each.query()}
        self._in_flight[block_id] = copied
        wait: Callable[[], None] = copied.synchronize
        return wait

    def load(self, content: memoryview, block_id: int) -> None:
        """Copy into a block, and wait for the end of it in the thread of loads."""
        source, at = torch.frombuffer(content, dtype=torch.uint8), 0
        with torch.cuda.stream(self._loads):
            for region in self._regions:
                size = region.shape[1]
                region[block_id].copy_(source[at : at + size], non_blocking=True)
                at += size
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._loads)
        copied.synchronize()

    def protect(self, block_ids: Sequence[int]) -> None:
        """Have the engine's stream wait for saves of blocks that it is about to overwrite."""
        for block_id in self._in_flight.keys() & set(block_ids):
            copied = self._in_flight.pop(block_id)
            if not copied.query():
                torch.cuda.current_stream(self._device).wait_event(copied)
