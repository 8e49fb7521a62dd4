"""What only the disk tier promises: it survives, it is bounded, it never serves damage."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiers import DiskCache

MIB = 1024 * 1024


async def test_survives_closing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    await cache.set("a", b"1")
    await cache.close()
    again = DiskCache(tmp_path, MIB)
    assert await again.get("a") == b"1"
    await again.close()


async def test_survives_kill(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, pathlib, time\n"
        "from tiers import DiskCache\n"
        "async def main():\n"
        "    cache = DiskCache(pathlib.Path(sys.argv[1]), 1 << 20)\n"
        "    for number in range(20):\n"
        "        await cache.set(str(number), b'v%d' % number)\n"
        "    print('stored', flush=True)\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stored\n"
        os.kill(process.pid, signal.SIGKILL)
    cache = DiskCache(tmp_path, MIB)
    assert [await cache.get(str(number)) for number in range(20)] == [
        b"v%d" % number for number in range(20)
    ]
    await cache.close()


async def test_the_file_stays_within_its_limit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    for number in range(2000):
        await cache.set(f"{number}", os.urandom(number % 9000))
    await cache.close()
    assert (tmp_path / "data.mdb").stat().st_size <= MIB


async def test_a_damaged_record_is_a_miss(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    await cache.set("a", b"precious" * 20)
    await cache.close()
    file = tmp_path / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"precious", b"pRecious"))
    again = DiskCache(tmp_path, MIB)
    assert await again.get("a") is None
    assert again.usage.damaged == 1
    await again.close()


async def test_a_file_that_is_not_lmdb_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    cache = DiskCache(tmp_path, MIB)
    await cache.set("a", b"1")
    assert await cache.get("a") == b"1"
    await cache.close()
    aside = list(tmp_path.glob("data.mdb.damaged-*"))
    assert [file.read_bytes()[:14] for file in aside] == [b"not a database"]


async def test_is_private(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new", MIB)
    await cache.close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new" / "data.mdb").stat().st_mode & 0o077 == 0


def test_refuses_a_limit_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        DiskCache(tmp_path, 1000)
