"""Patience with locks, and a folder for tests that commit hundreds of times."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import HANGS_S
from tiers.prefix_kv import folder as folder_module

MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def _locks_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for who holds a lock while the disk or the machine stands still."""
    monkeypatch.setattr(folder_module, "LOCK_WAIT_S", HANGS_S)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, if there is such a file system: no commit waits for a disk there."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)
