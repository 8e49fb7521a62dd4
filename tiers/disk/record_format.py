"""The bytes in the disk tier's file: records, rows of its indexes, blobs.

It owns their layout and checksums, and knows nothing of LMDB. `FORMAT` changes with any of it.
"""

from struct import Struct, error
from typing import NamedTuple
from zlib import crc32

from tiers.key import DOT, SCOPE_LENGTH
from tiers.key import scope_of as scope_of_text

FORMAT = 3

_HEADER = Struct("<BIBdQ")
"""Format version, CRC-32 of the key and all that follows, coding, expiry (Unix s), sequence."""
_HEADER_BYTES = _HEADER.size
_CHECKED_FROM = Struct("<BI").size
_CRC = Struct("<I")
_SORT_KEY = Struct(">dQ")
_DOT = DOT.encode()
NO_SCOPE = bytes(SCOPE_LENGTH)
"""The scope of a key without one."""
_SEQUENCE = Struct(">Q")
_ROW = Struct("<dQd")
_BYTES = Struct("<Q")


class IndexRow(NamedTuple):
    """An entry's place in the orders of eviction and of expiry, and its key."""

    priority: float
    touch: int
    """The number of its last store or read: of equal priorities, the higher stays longer."""
    expires_at: float
    key: bytes


def pack(key: bytes, coding: int, expires_at: float, sequence: int, payload: bytes) -> bytes:
    """Return the record of an entry."""
    rest = _HEADER.pack(FORMAT, 0, coding, expires_at, sequence)[_CHECKED_FROM:]
    checksum = crc32(payload, crc32(rest, crc32(key)))
    return _HEADER.pack(FORMAT, checksum, coding, expires_at, sequence) + payload


def unpack(key: bytes, record: memoryview) -> tuple[int, float, int, memoryview]:
    """Return coding, expiry, sequence number, and payload, which lives as long as `record`.

    Raises:
        ValueError: another format version, or the checksum is wrong.
    """
    if len(record) < _HEADER_BYTES:
        raise ValueError("record is cut short")
    version, checksum, coding, expires_at, sequence = _HEADER.unpack_from(record)
    if version != FORMAT or checksum != crc32(record[_CHECKED_FROM:], crc32(key)):
        raise ValueError("record does not verify")
    return coding, expires_at, sequence, record[_HEADER_BYTES:]


def sequence_of(record: memoryview) -> int:
    """Return the sequence number of a record that may be damaged; 0, which none has, if cut."""
    return int(_HEADER.unpack_from(record)[4]) if len(record) >= _HEADER.size else 0


def pack_sort_key(number: float, touch: int) -> bytes:
    """Return a key that sorts by `number`, of which negative ones are equal, then by `touch`."""
    return _SORT_KEY.pack(max(number, 0.0), touch)


def unpack_sort_key(sort_key: bytes | memoryview) -> tuple[float, int]:
    """Read what `pack_sort_key` wrote."""
    number, touch = _SORT_KEY.unpack(sort_key)
    return number, touch


def scope_of(key: bytes) -> bytes:
    """Return a key's scope, as `tiers.key` does, or `NO_SCOPE`."""
    if key[SCOPE_LENGTH : SCOPE_LENGTH + 1] != _DOT:
        return NO_SCOPE
    return scope_of_text(key[: SCOPE_LENGTH + 1].decode(errors="replace")).encode() or NO_SCOPE


def pack_order(row: IndexRow) -> bytes:
    """Return a key that sorts by scope, then by priority and touch."""
    return scope_of(row.key) + pack_sort_key(row.priority, row.touch)


def unpack_order(row: bytes | memoryview) -> tuple[bytes, bytes]:
    """Return scope and sort key of what `pack_order` wrote."""
    return bytes(row[:SCOPE_LENGTH]), bytes(row[SCOPE_LENGTH:])


def pack_sequence(sequence: int) -> bytes:
    """Return a key that sorts by age."""
    return _SEQUENCE.pack(sequence)


def unpack_sequence(key: bytes | memoryview) -> int:
    """Read what `pack_sequence` wrote."""
    return int(_SEQUENCE.unpack(key)[0])


def pack_row(row: IndexRow) -> bytes:
    """Return a row as it is stored."""
    return _ROW.pack(row.priority, row.touch, row.expires_at) + row.key


def unpack_row(row: memoryview) -> IndexRow:
    """Read what `pack_row` wrote."""
    priority, touch, expires_at = _ROW.unpack_from(row)
    return IndexRow(priority, touch, expires_at, bytes(row[_ROW.size :]))


def pack_blob(name: bytes, blob: bytes) -> bytes:
    """Return `blob` after a checksum of it and its name."""
    return _CRC.pack(crc32(blob, crc32(name))) + blob


def begins_with(data: memoryview, head: bytes) -> bool:
    """Return whether the blob in what `pack_blob` wrote begins with `head`, damaged or not."""
    return data[_CRC.size : _CRC.size + len(head)] == head


def unpack_blob(name: bytes, data: memoryview) -> bytes:
    """Read what `pack_blob` wrote.

    Raises:
        ValueError: the checksum is wrong.
    """
    blob = data[_CRC.size :]
    if len(data) < _CRC.size or _CRC.unpack_from(data)[0] != crc32(blob, crc32(name)):
        raise ValueError(f"{name.decode()} does not verify")
    return bytes(blob)


def pack_scope_bytes(scope: bytes, held_bytes: int) -> bytes:
    """Return the row of the bytes that a scope holds."""
    return pack_blob(scope, _BYTES.pack(held_bytes))


def unpack_scope_bytes(scope: bytes, row: memoryview | None) -> int:
    """Read what `pack_scope_bytes` wrote; 0 where there is no row, or none that verifies."""
    try:
        return 0 if row is None else int(_BYTES.unpack(unpack_blob(scope, row))[0])
    except (ValueError, error):
        return 0
