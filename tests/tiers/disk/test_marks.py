"""When the disk tier's file is opened at once, and when it is verified first."""

import asyncio
import os
import shutil
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.tiers.child import Child
from tiers import DiskCache
from tiers.disk import Durability
from tiers.disk.file import DATA
from tiers.disk.marks import CLEAN, IN_USE, MAX_DEATHS, Marks

MIB = 1024 * 1024


def write_and_wait(connection: Connection, folder: Path, durability: Durability) -> None:
    async def main() -> None:
        cache = DiskCache(folder, MIB, durability=durability)
        connection.send(cache.is_open)
        await cache.set("a", b"1" * 9000)
        await cache.save("barrier", b"")
        connection.send("stored")
        await asyncio.Event().wait()

    asyncio.run(main())


def kill(folder: Path, durability: Durability = Durability.COMMIT) -> None:
    """Have a process store an entry in `folder`, and kill it."""
    with Child(write_and_wait, folder, durability) as child:
        assert child.connection.recv() is True
        assert child.connection.recv() == "stored"


@pytest.fixture
def boot_id(tmp_path: Path, monkeypatch) -> Path:
    """The file that names this boot, for tests to change."""
    made = tmp_path / "boot_id"
    shutil.copy("/proc/sys/kernel/random/boot_id", made)
    monkeypatch.setattr("tiers.disk.marks._BOOT_ID", made)
    return made


@pytest.mark.parametrize("is_other_boot", [False, True], ids=["kill", "system crash"])
@pytest.mark.parametrize("durability", Durability)
async def test_only_unsynced_commits_of_another_boot_are_verified(
    tmp_path: Path, boot_id: Path, caplog, may_verify, durability: Durability, is_other_boot: bool
) -> None:
    folder = tmp_path / "disk"
    kill(folder, durability)
    kill(folder, durability)
    if is_other_boot:
        boot_id.write_text("another\n")
    is_verified = is_other_boot and durability is Durability.OS
    cache = DiskCache(folder, MIB)
    assert cache.is_open is not is_verified
    may_verify.set()
    await cache.opened()
    assert cache.read("a") == b"1" * 9000
    await cache.close()
    assert ("verifying" in caplog.text) is is_verified
    assert (folder / CLEAN).exists()
    assert not (folder / IN_USE).exists()


async def test_what_kills_again_and_again_is_verified(tmp_path: Path, caplog, may_verify) -> None:
    """A damaged file may be what kills, and must not do so for ever."""
    folder = tmp_path / "disk"
    for _ in range(MAX_DEATHS):
        kill(folder)
    cache = DiskCache(folder, MIB)
    assert not cache.is_open
    may_verify.set()
    await cache.opened()
    assert cache.read("a") == b"1" * 9000
    assert "may be damaged; verifying" in caplog.text
    await cache.close()
    for _ in range(MAX_DEATHS - 1):
        kill(folder)
    cache = DiskCache(folder, MIB)
    assert cache.is_open
    await cache.close()
    kill(folder)


async def test_a_boot_without_a_name_is_another(tmp_path: Path, boot_id: Path) -> None:
    kill(tmp_path / "disk", Durability.OS)
    boot_id.unlink()
    assert not Marks(tmp_path / "disk").is_trusted()


async def test_who_syncs_does_not_hide_who_does_not(tmp_path: Path, boot_id: Path) -> None:
    with Child(write_and_wait, tmp_path / "disk", Durability.OS) as child:
        assert child.connection.recv() is True
        assert child.connection.recv() == "stored"
        kill(tmp_path / "disk", Durability.COMMIT)
    assert Marks(tmp_path / "disk").is_trusted()
    boot_id.write_text("another\n")
    assert not Marks(tmp_path / "disk").is_trusted()


async def test_a_copy_is_verified(tmp_path: Path, may_verify) -> None:
    kill(tmp_path / "disk")
    shutil.copytree(tmp_path / "disk", tmp_path / "copy")
    cache = DiskCache(tmp_path / "copy", MIB)
    assert not cache.is_open
    may_verify.set()
    await cache.opened()
    assert cache.read("a") == b"1" * 9000
    await cache.close()


async def test_a_truncated_file_is_quarantined(tmp_path: Path, caplog, may_verify) -> None:
    kill(tmp_path)
    os.truncate(tmp_path / DATA, (tmp_path / DATA).stat().st_size - 4096)
    cache = DiskCache(tmp_path, MIB)
    assert not cache.is_open
    may_verify.set()
    await cache.opened()
    assert cache.read("a") is None
    assert "the file is quarantined as" in caplog.text
    assert await cache.set("a", b"2")
    await cache.close()
    assert len(list(tmp_path.glob(f"{DATA}.aside-*"))) == 1
    assert Marks(tmp_path).is_clean()


@pytest.mark.parametrize("is_killed", [False, True])
async def test_what_looked_damaged_is_verified_also_after_a_kill(
    tmp_path: Path, may_verify, is_killed: bool
) -> None:
    cache = DiskCache(tmp_path, MIB)
    await cache.set("a", b"1")
    cache._recovery.distrust()
    if not is_killed:
        await cache.close()
    assert not Marks(tmp_path).is_trusted()
    await cache.close()
    again = DiskCache(tmp_path, MIB)
    assert not again.is_open
    may_verify.set()
    await again.opened()
    assert again.read("a") == b"1"
    await again.close()
    assert Marks(tmp_path).is_clean()


async def test_marks_that_can_not_be_written_cost_a_verification(
    tmp_path: Path, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("tiers.disk.marks.os.fsync", full)
        cache = DiskCache(tmp_path, MIB)
    assert cache.is_open
    assert await cache.set("a", b"1")
    assert not Marks(tmp_path).is_trusted()
    await cache.close()
    assert Marks(tmp_path).is_clean()
