"""Verifies a disk tier's file: `python -m tiers.disk.verify [--repair | --records] FOLDER`.

First the pages, read by py-lmdb's verifier, which never hands them to LMDB, then every record,
read by LMDB. Run it in a process of its own, which a damaged page may crash, and only on a file
that nobody writes; with `--records` the pages are left out, and others may write. Prints one line
of JSON: `entries` and `damaged`, or the `problem` for which the file can't be used.
"""

import argparse
import json
import os
import select
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from math import inf
from pathlib import Path
from struct import Struct, error
from typing import Any

import lmdb
import lmdb.verify

from tiers.disk.codec import ZSTD_DICTIONARY, Codec
from tiers.disk.file import DATA, DiskFile, OtherFormatError, alike
from tiers.disk.record_format import (
    NOBODY,
    pack_order,
    pack_rank,
    pack_sequence,
    scope_of,
    unpack,
    unpack_held,
)
from tiers.disk.transaction import Databases, Transaction, place_of

_BATCH = 10_000
_PAGE_HEADER_BYTES = 16
_BOUNDS = Struct("=HH")
_NODE = Struct("=HHHH")
"""Low and high half of the value's size, flags, size of the key."""
_REPAIR_BYTES = 64 * 1024 * 1024
_GROWTH_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found in a file whose pages are whole."""

    entries: int
    damaged: int
    """Of them, entries that don't verify."""


def main() -> int:
    """Verify, print, and return 0 if the file can be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--repair", action="store_true", help="drop damaged entries")
    how.add_argument("--records", action="store_true", help="only records, of a file in use")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    threading.Thread(target=_end_with_reader, daemon=True).start()
    try:
        report = (
            verify_records(options.folder)
            if options.records
            else verify(options.folder, repair=options.repair)
        )
    except ValueError as exc:
        print(json.dumps({"problem": str(exc)}))
        return 1
    print(json.dumps({"entries": report.entries, "damaged": report.damaged}))
    return 0


def _end_with_reader() -> None:
    """End when nobody is left to read from the pipe that we print to; LMDB's file stays whole."""
    closed = select.poll()
    # Errors are told whatever is asked for.
    closed.register(1, 0)
    if any(events & select.POLLERR for _, events in closed.poll()):
        os._exit(1)


def verify(folder: Path, *, repair: bool = False) -> VerifyReport:
    """Verify the file in `folder`; with `repair`, drop damaged entries and mend the indexes.

    Raises:
        ValueError: its pages are damaged, or it has another format.
        OSError: it can't be read.
    """
    if problems := _problems(folder):
        raise ValueError(f"its pages are damaged: {problems[0]} ({len(problems)} problems)")
    # To repair takes room as well.
    max_bytes = (folder / DATA).stat().st_size + _REPAIR_BYTES
    try:
        file = DiskFile(folder, max_bytes, reads_values=False)
    except (OtherFormatError, lmdb.Error) as exc:
        raise ValueError(str(exc)) from exc
    try:
        entries, damaged, is_indexed = _walk(file)
        if repair and (damaged or not is_indexed):
            _repair(file, damaged)
    except lmdb.Error as exc:
        raise ValueError(f"its pages are damaged: {exc}") from exc
    finally:
        file.close()
    return VerifyReport(entries, len(damaged))


def verify_records(folder: Path) -> VerifyReport:
    """Verify the records of a file that others may write; what changes meanwhile may be missed.

    Raises:
        ValueError: its pages are damaged, or it has another format.
        OSError: it can't be read.
    """
    # Others may let it grow, which this process would have to follow.
    max_bytes = 2 * (folder / DATA).stat().st_size + _GROWTH_BYTES
    try:
        file = DiskFile(folder, max_bytes, reads_values=False)
    except (OtherFormatError, lmdb.Error) as exc:
        raise ValueError(str(exc)) from exc
    entries = damaged = 0
    try:
        last = b""
        while keys := file.keys_after(last):
            last = keys[-1]
            # One transaction a batch: a long one would keep the writers from reusing pages.
            with file.env.begin(db=file.dbs.entries, buffers=True) as txn:
                for key in keys:
                    if (record := txn.get(key)) is None:
                        continue
                    entries += 1
                    try:
                        unpack(key, record)
                    except ValueError:
                        damaged += 1
    except lmdb.Error as exc:
        raise ValueError(f"its pages are damaged: {exc}") from exc
    finally:
        file.close()
    return VerifyReport(entries, damaged)


def _problems(folder: Path) -> list[str]:
    with (folder / DATA).open("rb") as file:
        try:
            problems: list[str] = _Pages(file, (folder / DATA).stat().st_size).verify()
        except lmdb.verify.VerifyError as exc:
            return [str(exc)]
    return problems


class _Pages(lmdb.verify._Verifier):  # noqa: SLF001
    """py-lmdb's verifier, which also looks whether the nodes of a page fill it without a gap.

    LMDB moves bytes by the sizes that nodes claim, so a wrong one damages its neighbours later.
    """

    def _walk_leaf(self, ctx: dict[str, Any], pgno: int, buf: bytes) -> None:
        self._check_packing(pgno, buf, is_leaf=True)
        super()._walk_leaf(ctx, pgno, buf)

    def _walk_branch(self, ctx: dict[str, Any], pgno: int, buf: bytes, depth: int) -> None:
        self._check_packing(pgno, buf, is_leaf=False)
        super()._walk_branch(ctx, pgno, buf, depth)

    def _check_packing(self, pgno: int, buf: bytes, *, is_leaf: bool) -> None:
        lower, upper = _BOUNDS.unpack_from(buf, _PAGE_HEADER_BYTES - _BOUNDS.size)
        end = upper
        try:
            for at in sorted(memoryview(buf)[_PAGE_HEADER_BYTES:lower].cast("H")):
                low, high, flags, key_bytes = _NODE.unpack_from(buf, at)
                size = _NODE.size + key_bytes
                if is_leaf:
                    size += 8 if flags & lmdb.verify.F_BIGDATA else low | high << 16
                if at != end:
                    break
                end += size + size % 2
        except (ValueError, TypeError, error):
            end = -1
        if end != len(buf):
            self.err(f"page {pgno} has nodes with a gap between them, or that overlap")


def _walk(file: DiskFile) -> tuple[int, list[bytes], bool]:
    """Return the number of entries, the keys of damaged ones, and whether the indexes are right.

    Raises:
        ValueError: an entry isn't found by its key.
    """
    damaged, is_indexed, expiring = [], True, 0
    held: Counter[bytes] = Counter()
    dbs = file.dbs
    with file.env.begin(buffers=True) as txn:
        if any(any(db.flags().values()) for db in dbs):
            raise ValueError("its pages are damaged: a database has flags")
        for buffer, record in txn.cursor(db=dbs.entries):
            key = bytes(buffer)
            if txn.get(key, db=dbs.entries) is None:
                raise ValueError("its pages are damaged: an entry isn't found by its key")
            try:
                coding, expires_at, sequence, _ = unpack(key, record)
                key.decode()
            except ValueError:
                damaged.append(key)
                continue
            if coding == ZSTD_DICTIONARY and not file.learn(txn):
                damaged.append(key)
            expiring += expires_at < inf
            held[scope_of(key)] += len(record)
            is_indexed = is_indexed and _is_indexed(txn, dbs, key, expires_at, sequence)
        entries, *rows = (txn.stat(db)["entries"] for db in dbs[:4])
        del held[NOBODY]
        counted = {
            bytes(scope): unpack_held(bytes(scope), row) for scope, row in txn.cursor(db=dbs.scopes)
        }
    is_indexed = is_indexed and rows == [entries, entries, expiring] and counted == held
    return entries, damaged, is_indexed


def _is_indexed(
    txn: "lmdb.Transaction[memoryview]",
    dbs: Databases,
    key: bytes,
    expires_at: float,
    sequence: int,
) -> bool:
    place = place_of(txn, dbs, sequence)
    if place is None or (place.key, place.expires_at) != (key, expires_at):
        return False
    name = txn.get(pack_order(place), db=dbs.order)
    if name is None or bytes(name) != pack_sequence(sequence):
        return False
    rank = pack_rank(expires_at, sequence)
    return expires_at == inf or txn.get(rank, db=dbs.expiries) is not None


def _repair(file: DiskFile, damaged: list[bytes]) -> None:
    """Drop the damaged entries, and make the indexes anew; what was worth most is forgotten."""
    with file.env.begin(write=True) as txn:
        for key in damaged:
            txn.delete(key, db=file.dbs.entries)
        for db in (file.dbs.places, file.dbs.order, file.dbs.expiries, file.dbs.scopes):
            txn.drop(db, delete=False)
    with file.env.begin(db=file.dbs.entries) as txn:
        keys = list(txn.cursor().iternext(values=False))
    for start in range(0, len(keys), _BATCH):
        with file.env.begin(write=True, buffers=True) as txn:
            work = Transaction(txn, file.dbs, Codec(compresses=False), alike)
            for key in keys[start : start + _BATCH]:
                work.index(key)
            work.end()


if __name__ == "__main__":
    sys.exit(main())
