"""Encryption of the disk tier's file: nothing to be read without the key, and nothing lost."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import HANGS_S
from tiers import DiskCache, Purges
from tiers.disk import EncryptionKeyError, compact, verify_in_use
from tiers.disk.file import DATA, DiskFile
from tiers.disk.maintenance import verify
from tiers.disk.record_format import pack, unpack
from tiers.encryption import TAG_BYTES, Cipher
from tiers.purges.purges import FRESH_S

MIB = 1024 * 1024
KEY, OTHER_KEY = os.urandom(32), os.urandom(32)
SECRET = b"the capital of nowhere is secret"


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[DiskCache]]]:
    async with AsyncExitStack() as stack:

        async def make(key: bytes | None = KEY, **options) -> DiskCache:
            cache = DiskCache(tmp_path, 4 * MIB, encryption_key=key, **options)
            stack.push_async_callback(cache.close)
            await cache.opened()
            return cache

        yield make


def value(number: int) -> bytes:
    return b'{"choices": [{"message": "%s %d"}]}' % (SECRET * 20, number)


async def fill(cache: DiskCache, count: int) -> None:
    for start in range(0, count, 100):
        wanted = range(start, min(start + 100, count))
        await asyncio.gather(*(cache.set(f"{n}", value(n)) for n in wanted))


@pytest.mark.parametrize("compresses", [False, True])
async def test_nothing_stands_in_the_file_and_all_is_read(opened, tmp_path, compresses) -> None:
    cache = await opened(compresses=compresses)
    await fill(cache, 600)
    assert await cache.save("sketch", SECRET)
    assert await cache.update("tags", lambda before: (before or b"") + SECRET)
    assert await cache.update("tags", lambda before: (before or b"") + SECRET)
    assert cache._file._codec.has_dictionary == compresses
    await cache.close()
    content = (tmp_path / DATA).read_bytes()
    for part in (SECRET, b"capital", b"choices", KEY):
        assert part not in content
    # Compression is a choice of the writer's, encryption one of the file's.
    again = await opened(compresses=not compresses)
    assert [again.read(f"{n}") for n in range(600)] == [value(n) for n in range(600)]
    assert len(list(again.hottest())) == 600
    assert again.load("sketch") == SECRET
    assert again.load("tags") == SECRET * 2
    assert again.reload("tags", SECRET[:8]) is None
    assert again.reload("tags", b"other") == SECRET * 2


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (KEY, OTHER_KEY, "encrypted with another key"),
        (KEY, None, "is encrypted, and there is no key"),
        (None, KEY, "is not encrypted, and only a new file can be"),
    ],
    ids=["another", "none", "first"],
)
@pytest.mark.parametrize("is_clean", [True, False])
async def test_another_key_is_refused_and_nothing_lost(
    opened, tmp_path: Path, caplog, first, then, message: str, is_clean: bool
) -> None:
    cache = await opened(first)
    await fill(cache, 3)
    await cache.close()
    if not is_clean:
        (tmp_path / "clean").unlink()
    before = (tmp_path / DATA).read_bytes()
    with pytest.raises(EncryptionKeyError, match=message):
        await opened(then)
    if not is_clean:
        assert message in caplog.text
    else:
        # Nor has the next one to verify it.
        assert (tmp_path / "clean").exists()
    assert (tmp_path / DATA).read_bytes() == before
    assert not list(tmp_path.glob("*aside*"))
    again = await opened(first)
    assert [again.read(f"{n}") for n in range(3)] == [value(n) for n in range(3)]


async def test_upkeep_needs_no_key(opened, tmp_path: Path) -> None:
    cache = await opened(compresses=True)
    await fill(cache, 600)
    assert (await verify_in_use(tmp_path)).damaged == 0
    await asyncio.gather(*(cache.delete(f"{n}") for n in range(300)))
    await cache.close()
    assert compact(tmp_path).after < 4 * MIB
    assert (await asyncio.to_thread(verify, tmp_path, repair=True)) == (300, 0, None)
    # Smaller than before: what is worth least is evicted when it is opened.
    (tmp_path / "clean").unlink()
    again = await opened()
    assert again.usage.damaged == 0
    assert [again.read(f"{n}") for n in range(300, 600)] == [value(n) for n in range(300, 600)]


async def test_what_was_changed_without_the_key_is_a_miss(opened, tmp_path: Path) -> None:
    cache = await opened()
    await fill(cache, 2)
    await cache.close()
    file = DiskFile(tmp_path, 4 * MIB, reads_values=False)
    with file.env.begin(write=True, db=file.dbs.entries) as txn:
        one, two = txn.get(b"0"), txn.get(b"1")
        # Under another's key, and in the clear, with checksums that are right.
        coding, expires_at, sequence, payload = unpack(b"1", memoryview(two))
        txn.put(b"0", pack(b"0", coding, expires_at, sequence, bytes(payload)))
        txn.put(b"1", pack(b"1", 0, expires_at, sequence, b"forged"))
    file.close()
    assert one
    again = await opened()
    assert [again.read("0"), again.read("1")] == [None, None]
    assert again.usage.damaged == 2


async def test_purges_are_known_after_a_restart_and_name_nothing(opened, tmp_path) -> None:
    cache = await opened()
    purges = Purges(cache, deadline_s=HANGS_S)
    origin = purges.provenance(["tag:top-secret-tag"])
    await purges.purge("tag:top-secret-tag")
    await cache.close()
    assert b"top-secret-tag" not in (tmp_path / DATA).read_bytes()
    again = await opened()
    assert Purges(again).is_purged("k", origin)


async def test_an_unchanged_table_of_purges_is_opened_once(opened, monkeypatch) -> None:
    times = 0
    decrypt = Cipher.decrypt

    def counted(cipher: Cipher, name: bytes, data: bytes | memoryview) -> bytes:
        nonlocal times
        times += name == b"blob:blob:purges"
        return decrypt(cipher, name, data)

    cache, now = await opened(), 0.0
    here, elsewhere = (Purges(cache, monotonic=lambda: now, deadline_s=HANGS_S) for _ in range(2))
    origin = here.provenance(["tag:a"])
    await elsewhere.purge("tag:a")
    monkeypatch.setattr(Cipher, "decrypt", counted)
    for changes in (1, 2):
        for _ in range(5):
            now += FRESH_S
            assert here.is_purged("k", origin)
        assert times == changes
        monkeypatch.undo()
        await elsewhere.purge("tag:b")
        monkeypatch.setattr(Cipher, "decrypt", counted)
    now += FRESH_S
    assert here.is_purged("k", origin._replace(packed_labels=b"tag:b"))
    assert times == 3


def test_values_and_large_values_with_one_number_never_share_a_nonce(monkeypatch) -> None:
    monkeypatch.setattr("os.urandom", lambda count: (b"\1\0\0\0" * 4)[-count:])
    cipher = Cipher(KEY)
    cipher.begin()
    large = bytearray(TAG_BYTES + 4)
    cipher.encrypt_large(7, b"same", large)
    assert cipher.encrypt(b"", b"same", 7)[12:-TAG_BYTES] != large[:-TAG_BYTES]


@given(name=st.binary(), plain=st.binary(), number=st.none() | st.integers(0, 2**64 - 1))
def test_a_seal_opens_only_as_it_was_made(name: bytes, plain: bytes, number: int | None) -> None:
    cipher = Cipher(KEY)
    kept = cipher.begin()
    sealed = cipher.encrypt(name, plain, number)
    later = Cipher(KEY)
    later.resume(kept)
    assert later.decrypt(name, sealed) == plain
    assert cipher.encrypt(name, plain, number) != sealed
    for wrong_name, wrong in (
        (name + b"x", sealed),
        (name, sealed[:-1]),
        (name, sealed[:20] + bytes([sealed[20] ^ 1]) + sealed[21:]),
        (name, b""),
    ):
        with pytest.raises(ValueError, match="not what was encrypted"):
            later.decrypt(wrong_name, wrong)
    with pytest.raises(EncryptionKeyError):
        Cipher(OTHER_KEY).resume(kept)
