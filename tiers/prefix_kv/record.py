"""Records of prefix blocks in the index: what a block is of, where it is, and until when it holds.

A block holds the keys and values that a model computed for a run of tokens, after all that came
before. Its name is an engine's hash of these tokens and of its parent's hash, so a chain of hashes
names a whole prefix. Tokens and parent are kept as well, and compared when a block is looked up.

It owns the layout of records and their checksums, and knows nothing of LMDB. `FORMAT` changes with
any of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct, error
from typing import NamedTuple, Self
from zlib import crc32

from tiers.encryption import TAG_BYTES, Cipher
from tiers.prefix_kv.index.extents import Extent

FORMAT = 1
SCOPE_BYTES = 16
"""Of a scope's digest, with which keys begin."""

_CRC = Struct("<I")
_HEAD = Struct(f"<BBIIQdQdQ{TAG_BYTES}sII")
"""Format, whether tokens name it, bytes, depth, sequence, priority, touch, expiry, purge epoch,
tag, number of extents, bytes of labels."""
_EXTENT = Struct("<II")
_DETAILS = Struct("<III")
"""Bytes of the parent's hash, of the adapter's name and of the salt; the rest are tokens."""


class BlockName(NamedTuple):
    """What names a block: its hash, and what the hash was made of."""

    hash: bytes
    parent: bytes
    """The parent's hash; empty for the first block of a prompt."""
    tokens: bytes
    """Its tokens, 4 bytes each."""


class BlockChain(NamedTuple):
    """The blocks of a prompt's beginning, in order, and what they have in common."""

    scope: bytes
    """Digest of all that changes the blocks' bytes or meaning."""
    names: Sequence[BlockName]
    labels: tuple[str, ...] = ()
    """By which the blocks may be purged."""
    adapter: str = ""
    """Name of the adapter with which an engine computes them."""
    salt: str = ""
    """The salt in the first block's hash."""
    is_plain: bool = True
    """Whether tokens, adapter and salt are all that the hashes are made of."""

    def key(self, at: int) -> bytes:
        """Return the key of the block at that position."""
        return self.scope + self.names[at].hash


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A record."""

    key: bytes
    size: int
    """Bytes of the block."""
    depth: int
    """Position in its chain, from 0."""
    sequence: int
    """No other block of the file ever had it."""
    priority: float
    """Blocks of the lowest priority are evicted first. A parent's is never lower."""
    touch: int
    """The number of its last store or touch: of equal priorities, the higher stays longer."""
    expires_at: float
    """Unix seconds."""
    purge_epoch: int
    tag: bytes
    """Checksum of the block's bytes; of an encrypted block, zeros."""
    extents: tuple[Extent, ...]
    labels: bytes
    """Packed as those of entries are."""
    is_plain: bool
    details: bytes
    """Parent, adapter, salt and tokens, perhaps encrypted."""

    def pack(self) -> bytes:
        """Return the bytes that `unpack` reads."""
        head = _HEAD.pack(
            FORMAT, self.is_plain, self.size, self.depth, self.sequence, self.priority,
            self.touch, self.expires_at, self.purge_epoch, self.tag, len(self.extents),
            len(self.labels),
        )  # fmt: skip
        extents = b"".join(_EXTENT.pack(*extent) for extent in self.extents)
        rest = head + extents + self.labels + self.details
        return _CRC.pack(crc32(rest, crc32(self.key))) + rest

    @classmethod
    def unpack(cls, key: bytes, record: bytes) -> Self:
        """Read what `pack` wrote.

        Raises:
            ValueError: it is damaged, or of another format.
        """
        rest = record[_CRC.size :]
        try:
            if _CRC.unpack_from(record)[0] != crc32(rest, crc32(key)):
                raise ValueError("the record does not verify")
            (
                version, is_plain, size, depth, sequence, priority, touch, expires_at, purge_epoch,
                tag, extents, label_bytes,
            ) = _HEAD.unpack_from(rest)  # fmt: skip
        except error as exc:
            raise ValueError("the record is cut short") from exc
        if version != FORMAT:
            raise ValueError("the record is of another format")
        at = _HEAD.size + extents * _EXTENT.size
        return cls(
            key, size, depth, sequence, priority, touch, expires_at, purge_epoch, tag,
            tuple(_EXTENT.iter_unpack(rest[_HEAD.size : at])),
            rest[at : at + label_bytes], bool(is_plain), rest[at + label_bytes :],
        )  # fmt: skip


class BlockDetails(NamedTuple):
    """What a block is of."""

    parent: bytes
    adapter: str
    salt: str
    tokens: bytes


def pack_details(details: BlockDetails, key: bytes, sequence: int, cipher: Cipher | None) -> bytes:
    """Return the details of the block under `key`, encrypted if there is a cipher."""
    adapter, salt = (
        details.adapter.encode(errors="surrogatepass"),
        details.salt.encode(errors="surrogatepass"),
    )
    lengths = _DETAILS.pack(len(details.parent), len(adapter), len(salt))
    plain = lengths + details.parent + adapter + salt + details.tokens
    return plain if cipher is None else cipher.encrypt(key, plain, sequence)


def unpack_details(data: bytes, key: bytes, cipher: Cipher | None) -> BlockDetails:
    """Read what `pack_details` wrote.

    Raises:
        ValueError: it was encrypted otherwise, or is damaged.
    """
    plain = data if cipher is None else cipher.decrypt(key, data)
    try:
        parent, adapter, salt = _DETAILS.unpack_from(plain)
    except error as exc:
        raise ValueError("the details are cut short") from exc
    adapter_at = _DETAILS.size + parent
    salt_at = adapter_at + adapter
    return BlockDetails(
        plain[_DETAILS.size : adapter_at],
        plain[adapter_at:salt_at].decode(errors="surrogatepass"),
        plain[salt_at : salt_at + salt].decode(errors="surrogatepass"),
        plain[salt_at + salt :],
    )
