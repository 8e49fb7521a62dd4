"""What one transaction on the index sees: records, order of eviction, purges, counters.

It owns the index's databases and what is counted in it; `transaction` changes them.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from typing import Any, NamedTuple
from zlib import crc32

import lmdb

from tiers.encryption import Cipher
from tiers.prefix_kv.index.extents import unpack_row
from tiers.prefix_kv.record import BlockDetails, StoredBlock, unpack_details
from tiers.purges.table import HEAD_BYTES, PurgeTable

PURGES, STATE, SKETCH, SCOPE = b"purges", b"state", b"sketch ", b"scope "
"""Names of what is kept beside blocks; the last two stand before a scope."""
COUNTER = Struct("<d")
_STATE = Struct("<QQdIII?")
_CRC = Struct("<I")


class PrefixDatabases(NamedTuple):
    """The databases of an index."""

    blocks: Any
    """Records by key."""
    order: Any
    """Keys by order of eviction."""
    free: Any
    """Free pages (`extents`)."""
    reserved: Any
    """Owners and pages of reservations, by sequence."""
    counters: Any
    meta: Any


@dataclass(slots=True)
class IndexState:
    """What is counted in an index."""

    sequence: int = 0
    touch: int = 0
    age: float = 0.0
    end: int = 0
    """The page after the last one that the data file has."""
    limit: int = 0
    """The page after the last one that it may have."""
    free: int = 0
    """Pages before `end` that nobody has."""
    is_leaky: bool = False
    """Whether there may be pages before `end` that nobody has and that aren't known to be free."""

    def pack(self) -> bytes:
        """Return the bytes that `unpack` reads."""
        packed = _STATE.pack(
            self.sequence, self.touch, self.age, self.end, self.limit, self.free, self.is_leaky
        )
        return packed + _CRC.pack(crc32(packed))

    @classmethod
    def unpack(cls, data: bytes) -> "IndexState":
        """Read what `pack` wrote.

        Raises:
            lmdb.CorruptedError: it is damaged. A number used twice would break the encryption.
        """
        packed = data[: _STATE.size]
        if data[_STATE.size :] != _CRC.pack(crc32(packed)):
            raise lmdb.CorruptedError("the state does not verify")
        return cls(*_STATE.unpack(packed))


class KnownPurges:
    """The purges in an index, unpacked when they have changed. Any thread may ask."""

    def __init__(self) -> None:
        # Of one packed table, so that no thread sees one's head with another's labels.
        self._known = b"", PurgeTable()

    def of(self, txn: "lmdb.Transaction[bytes]", meta: Any) -> PurgeTable:
        """Return the purges that a transaction sees."""
        packed = txn.get(PURGES, db=meta)
        if packed is None:
            return PurgeTable()
        head, table = self._known
        if packed[:HEAD_BYTES] != head:
            try:
                table = PurgeTable.unpack(packed)
            except ValueError as exc:
                raise lmdb.CorruptedError(str(exc)) from exc
            self._known = packed[:HEAD_BYTES], table
        return table


class Snapshot:
    """What a transaction sees.

    Args:
        txn: the transaction.
        dbs: the index's databases.
        purges: those that were known before.
        cipher: decrypts what names a block, if it is encrypted.
        now: Unix seconds.
    """

    def __init__(
        self,
        txn: "lmdb.Transaction[bytes]",
        dbs: PrefixDatabases,
        purges: KnownPurges,
        cipher: Cipher | None,
        now: float,
    ) -> None:
        self.txn, self.dbs, self.cipher, self.now = txn, dbs, cipher, now
        self.purges = purges.of(txn, dbs.meta)
        self.state = IndexState.unpack(self.meta(STATE) or b"")

    def meta(self, name: bytes) -> bytes | None:
        """Return what is kept under a name."""
        return self.txn.get(name, db=self.dbs.meta)

    def meta_after(self, prefix: bytes) -> dict[bytes, bytes]:
        """Return all that is kept under names with a prefix, by the rest of the name."""
        found: dict[bytes, bytes] = {}
        with self.txn.cursor(db=self.dbs.meta) as cursor:
            has_row = cursor.set_range(prefix)
            while has_row and cursor.key().startswith(prefix):
                found[cursor.key()[len(prefix) :]] = cursor.value()
                has_row = cursor.next()
        return found

    def record(self, key: bytes) -> StoredBlock | None:
        """Return a record, if there is one that isn't damaged."""
        record = self.txn.get(key, db=self.dbs.blocks)
        with suppress(ValueError):
            return None if record is None else StoredBlock.unpack(key, record)
        return None

    def is_served(self, block: StoredBlock) -> bool:
        """Return whether a block has neither expired nor been purged."""
        return block.expires_at > self.now and not self.purges.purges(
            "", block.purge_epoch, block.labels
        )

    def served(self, key: bytes) -> StoredBlock | None:
        """Return a record that may be served."""
        block = self.record(key)
        return block if block is not None and self.is_served(block) else None

    def details(self, block: StoredBlock) -> BlockDetails | None:
        """Return what a block is of, unless that is damaged."""
        with suppress(ValueError):
            return unpack_details(block.details, block.key, self.cipher)
        return None

    def keys_after(self, after: bytes, most: int) -> list[bytes]:
        """Return the next keys of blocks."""
        keys: list[bytes] = []
        with self.txn.cursor(db=self.dbs.blocks) as cursor:
            has_row = cursor.set_range(after + b"\0") if after else cursor.first()
            while has_row and len(keys) < most:
                keys.append(cursor.key())
                has_row = cursor.next()
        return keys

    def ordered_below(self, row: bytes | None, most: int) -> list[tuple[bytes, bytes]]:
        """Return the next rows of the order of eviction, from its end or below a row."""
        rows: list[tuple[bytes, bytes]] = []
        with self.txn.cursor(db=self.dbs.order) as order:
            is_above = row is not None and order.set_range(row)
            has_row = order.prev() if is_above else order.last()
            while has_row and len(rows) < most:
                rows.append(order.item())
                has_row = order.prev()
        return rows

    def used_pages(self) -> int:
        """Return how many pages of the index's file its databases take."""
        stats = [self.txn.stat(db) for db in self.dbs]
        return sum(
            stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats
        )

    def counters(self) -> Iterator[tuple[tuple[str, str], float]]:
        """Yield models, names and values of the counters."""
        with self.txn.cursor(db=self.dbs.counters) as cursor:
            for key, value in cursor:
                model, _, name = key.decode(errors="replace").partition("\0")
                yield (model, name), unpack_row(COUNTER, value)[0]
