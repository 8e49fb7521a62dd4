"""The bytes in the disk tier's file: records, rows of its indexes, blobs.

Owns their layout and checksums, and nothing of LMDB. `FORMAT` changes with any of it.
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
_RANK = Struct(">dQ")
_DOT = DOT.encode()
NOBODY = bytes(SCOPE_LENGTH)
"""The scope of a key without one."""
_SEQUENCE = Struct(">Q")
_PLACE = Struct("<dQd")
_BYTES = Struct("<Q")


class Place(NamedTuple):
    """Where an entry stands in the two orders, and its key."""

    priority: float
    tick: int
    """Tells entries of one priority apart: the one that was stored or read last is above."""
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
    """Return the sequence number of a record that need not verify; 0, which none has, if cut."""
    return int(_HEADER.unpack_from(record)[4]) if len(record) >= _HEADER.size else 0


def pack_rank(number: float, tick: int) -> bytes:
    """Return a key that sorts by `number`, if it isn't negative, and then by age."""
    return _RANK.pack(max(number, 0.0), tick)


def unpack_rank(rank: bytes | memoryview) -> tuple[float, int]:
    """Read what `pack_rank` wrote."""
    number, tick = _RANK.unpack(rank)
    return number, tick


def scope_of(key: bytes) -> bytes:
    """Return a key's scope, as `tiers.key` does, or `NOBODY`."""
    if key[SCOPE_LENGTH : SCOPE_LENGTH + 1] != _DOT:
        return NOBODY
    return scope_of_text(key[: SCOPE_LENGTH + 1].decode(errors="replace")).encode() or NOBODY


def pack_order(place: Place) -> bytes:
    """Return a key that sorts by scope, and then by rank."""
    return scope_of(place.key) + pack_rank(place.priority, place.tick)


def unpack_order(row: bytes | memoryview) -> tuple[bytes, bytes]:
    """Return scope and rank of what `pack_order` wrote."""
    return bytes(row[:SCOPE_LENGTH]), bytes(row[SCOPE_LENGTH:])


def pack_sequence(sequence: int) -> bytes:
    """Return a key that sorts by age."""
    return _SEQUENCE.pack(sequence)


def unpack_sequence(key: bytes | memoryview) -> int:
    """Read what `pack_sequence` wrote."""
    return int(_SEQUENCE.unpack(key)[0])


def pack_place(place: Place) -> bytes:
    """Return the row of an entry's place."""
    return _PLACE.pack(place.priority, place.tick, place.expires_at) + place.key


def unpack_place(row: memoryview) -> Place:
    """Read what `pack_place` wrote."""
    priority, tick, expires_at = _PLACE.unpack_from(row)
    return Place(priority, tick, expires_at, bytes(row[_PLACE.size :]))


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


def pack_held(scope: bytes, held_bytes: int) -> bytes:
    """Return the row of what a scope holds."""
    return pack_blob(scope, _BYTES.pack(held_bytes))


def unpack_held(scope: bytes, row: memoryview | None) -> int:
    """Read what `pack_held` wrote, in bytes; 0 where there is no row, or none that verifies."""
    try:
        return 0 if row is None else int(_BYTES.unpack(unpack_blob(scope, row))[0])
    except (ValueError, error):
        return 0
