"""Records of prefix blocks: what is packed is unpacked, and nothing else is."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.encryption import Cipher
from tiers.prefix_kv.record import BlockDetails, StoredBlock, pack_details, unpack_details

FLIPS = 300
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
FLOATS = st.floats(0, allow_nan=False)
TEXT = st.text(max_size=40) | st.just("\ud800 alone") | st.just("x" * 100_000)
BLOCKS = st.builds(
    StoredBlock, key=st.binary(min_size=48, max_size=48), size=U32, depth=U32, sequence=U64,
    priority=FLOATS, touch=U64, expires_at=FLOATS, purge_epoch=U64,
    tag=st.binary(min_size=16, max_size=16),
    extents=st.lists(st.tuples(U32, U32), max_size=5).map(tuple), labels=st.binary(max_size=200),
    is_plain=st.booleans(), details=st.binary(max_size=600),
)  # fmt: skip
DETAILS = st.builds(
    BlockDetails, st.binary(max_size=32), TEXT, TEXT, st.binary(max_size=64).map(lambda b: b * 4)
)
ONE = StoredBlock(
    b"k" * 48, 12_000, 3, 7, 2.5, 9, 1e9, 4, b"t" * 16, ((0, 2), (5, 1)), b"model:m", True,
    b"d" * 99,
)  # fmt: skip


def cipher() -> Cipher:
    made = Cipher(bytes(32), b"test")
    made.begin()
    return made


@given(BLOCKS)
def test_a_record_holds_all_of_a_block(block: StoredBlock) -> None:
    assert StoredBlock.unpack(block.key, block.pack()) == block


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_flipped_bit_is_found(seed: int) -> None:
    record = bytearray(ONE.pack())
    bit = random.Random(seed).randrange(len(record) * 8)
    record[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"verify|format|short"):
        StoredBlock.unpack(ONE.key, bytes(record))


def test_a_record_is_bound_to_its_key() -> None:
    with pytest.raises(ValueError, match="verify"):
        StoredBlock.unpack(b"l" * 48, ONE.pack())


def test_a_record_that_is_cut_short_is_refused() -> None:
    packed = ONE.pack()
    for size in range(len(packed)):
        with pytest.raises(ValueError, match=r"verify|short"):
            StoredBlock.unpack(ONE.key, packed[:size])


@given(DETAILS)
def test_details_are_kept_plain_or_encrypted(details: BlockDetails) -> None:
    key, ours = b"k" * 48, cipher()
    for each in (None, ours):
        packed = pack_details(details, key, 5, each)
        assert unpack_details(packed, key, each) == details
    with pytest.raises(ValueError, match="encrypted"):
        unpack_details(pack_details(details, key, 5, ours), b"l" * 48, ours)
    with pytest.raises(ValueError, match="encrypted"):
        unpack_details(pack_details(details, key, 5, ours), key, cipher())


def test_details_that_are_cut_short_are_refused() -> None:
    with pytest.raises(ValueError, match="short"):
        unpack_details(b"\1\0", b"", None)
