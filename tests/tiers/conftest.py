"""What the tests of the tiers share: a clock that only tests move, and every backend."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tiers import DiskCache, MemoryCache
from tiers.backend import ByteCache


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "disk"])
async def cache(request, clock: Clock, tmp_path: Path) -> AsyncIterator[ByteCache]:
    made: ByteCache
    if request.param == "memory":
        made = MemoryCache(1024 * 1024, clock=clock)
    else:
        made = DiskCache(tmp_path / "disk", 1024 * 1024, clock=clock)
    yield made
    await made.close()
