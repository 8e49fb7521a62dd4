"""Verifies a disk tier's file: `python -m tiers.disk.verify [--repair] FOLDER`.

First the pages, read by py-lmdb's verifier, which never hands them to LMDB, then every record,
read by LMDB. Run it in a process of its own, which a damaged page may crash, and only on a file
that nobody writes. Prints one line of JSON: `entries` and `damaged`, or the `problem` for which
the file can't be used.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path

import lmdb
import lmdb.verify

from tiers.disk.codec import ZSTD_DICTIONARY
from tiers.disk.file import DATA, DiskFile, OtherFormatError
from tiers.disk.record import pack_rank, pack_sequence, unpack
from tiers.disk.transaction import place_of

_BATCH = 1000
_REPAIR_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a file whose pages are whole."""

    entries: int
    damaged: int
    """Of them, entries that don't verify or that no index holds."""


def main() -> int:
    """Verify, print, and return 0 if the file can be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repair", action="store_true", help="drop the entries that are damaged")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        report = verify(options.folder, repair=options.repair)
    except ValueError as exc:
        print(json.dumps({"problem": str(exc)}))
        return 1
    print(json.dumps({"entries": report.entries, "damaged": report.damaged}))
    return 0


def verify(folder: Path, *, repair: bool = False) -> Report:
    """Verify the file in `folder`; with `repair`, drop the entries that are damaged.

    Raises:
        ValueError: its pages are damaged, or it has another format.
        OSError: it can't be read.
    """
    if problems := _problems(folder):
        raise ValueError(f"its pages are damaged: {problems[0]} ({len(problems)} problems)")
    # To drop an entry takes room as well.
    max_bytes = (folder / DATA).stat().st_size + _REPAIR_BYTES
    try:
        file = DiskFile(folder, max_bytes, clock=float, worth=_no_worth)
    except (OtherFormatError, lmdb.Error) as exc:
        raise ValueError(str(exc)) from exc
    try:
        entries, damaged = _walk(file)
        if repair:
            _drop(file, damaged)
    except lmdb.Error as exc:
        raise ValueError(f"its pages are damaged: {exc}") from exc
    finally:
        file.close()
    return Report(entries, len(damaged))


def _problems(folder: Path) -> list[str]:
    try:
        # A page that nothing refers to is lost, and harms nobody.
        problems = lmdb.verify.verify(str(folder))  # type: ignore[no-untyped-call]
        return [problem for problem in problems if "a leak" not in problem]
    except lmdb.verify.VerifyError as exc:
        return [str(exc)]


def _walk(file: DiskFile) -> tuple[int, list[bytes]]:
    """Return the number of entries, and the keys of those that are damaged."""
    damaged, dbs = [], file.dbs
    with file.env.begin(buffers=True) as txn:
        for db, key_bytes in ((dbs.order, 16), (dbs.expiries, 16), (dbs.places, 8)):
            if any(len(key) != key_bytes for key in txn.cursor(db=db).iternext(values=False)):
                raise ValueError("an index of it is damaged")
        for buffer, record in txn.cursor(db=dbs.entries):
            key = bytes(buffer)
            if not _is_whole(txn, file, key, record):
                damaged.append(key)
        return txn.stat(dbs.entries)["entries"], damaged


def _is_whole(
    txn: "lmdb.Transaction[memoryview]", file: DiskFile, key: bytes, record: memoryview
) -> bool:
    try:
        coding, expires_at, sequence, _ = unpack(key, record)
        key.decode()
    except ValueError:
        return False
    place = place_of(txn, file.dbs, sequence)
    if place is None or (place.key, place.expires_at) != (key, expires_at):
        return False
    if coding == ZSTD_DICTIONARY and not file.learn(txn):
        return False
    rank = txn.get(pack_rank(place.priority, place.tick), db=file.dbs.order)
    if rank is None or bytes(rank) != pack_sequence(sequence):
        return False
    return expires_at == inf or (
        txn.get(pack_rank(expires_at, sequence), db=file.dbs.expiries) is not None
    )


def _drop(file: DiskFile, keys: list[bytes]) -> None:
    for start in range(0, len(keys), _BATCH):
        with file.env.begin(write=True, db=file.dbs.entries) as txn:
            for key in keys[start : start + _BATCH]:
                txn.delete(key)


def _no_worth(_key: str, _bytes: int) -> float:
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
