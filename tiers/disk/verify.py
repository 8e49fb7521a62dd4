"""Verifies a disk tier's file: `python -m tiers.disk.verify [--repair | --records] FOLDER`.

First it verifies the pages without mapping them, then each record through LMDB. It runs in a
process of its own, which a damaged page may kill, on a file that nobody writes. With `--records`
it leaves the pages out, and others may write. It prints a `VerifyReport` as one line of JSON.
"""

import argparse
import json
import os
import select
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import NamedTuple

import lmdb

from tiers.disk.codec import ZSTD_DICTIONARY, Codec
from tiers.disk.file import DATA, DiskFile, OtherFormatError, equal_worth
from tiers.disk.record_format import (
    NO_SCOPE,
    pack_order,
    pack_sequence,
    pack_sort_key,
    scope_of,
    unpack,
    unpack_scope_bytes,
)
from tiers.disk.transaction import Databases, Transaction, row_of
from tiers.lmdb_pages import page_problems

_BATCH = 10_000
_REPAIR_BYTES = 64 * 1024 * 1024
_GROWTH_BYTES = 1024 * 1024 * 1024
# From the start on, SIGINT ends it without a traceback.
_MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from tiers.disk.verify import main; sys.exit(main())"
)
_PACKAGES = Path(__file__).parents[2]


class VerifyReport(NamedTuple):
    """What was found in a file."""

    entries: int
    damaged: int
    """Of them, entries that don't verify."""
    problem: str | None = None
    """Why the file can't be used at all."""


def command(folder: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that verifies the file in `folder`, and its environment."""
    # `-P`, or modules would first be looked for in the working directory.
    words = [sys.executable, "-P", "-c", _MAIN, *options, str(folder)]
    return words, os.environ | {"PYTHONPATH": str(_PACKAGES)}


def read_report(output: str | bytes, status: int | None) -> VerifyReport:
    """Return the report that the command printed, or that it ended with `status` without one."""
    try:
        return VerifyReport(**json.loads(output))
    except ValueError:
        return VerifyReport(0, 0, f"verifying it ended with status {status}")


def main() -> int:
    """Verify, print, and return 0 if the file can be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--repair", action="store_true", help="drop damaged entries")
    how.add_argument("--records", action="store_true", help="only records, of a file in use")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    threading.Thread(target=_exit_with_reader, daemon=True).start()
    try:
        report = (
            verify_records(options.folder)
            if options.records
            else verify(options.folder, repair=options.repair)
        )
    except ValueError as exc:
        report = VerifyReport(0, 0, str(exc))
    print(json.dumps(report._asdict()))
    return int(report.problem is not None)


def _exit_with_reader() -> None:
    """Exit when nobody reads our output any more; LMDB's file stays whole."""
    closed = select.poll()
    # Errors are reported whatever is asked for.
    closed.register(1, 0)
    if any(events & select.POLLERR for _, events in closed.poll()):
        os._exit(1)


def verify(folder: Path, *, repair: bool = False) -> VerifyReport:
    """Verify the file in `folder`; with `repair`, drop damaged entries and mend the indexes.

    Raises:
        ValueError: its pages are damaged, or it has another format.
        OSError: it can't be read.
    """
    if problems := page_problems(folder / DATA):
        raise ValueError(f"its pages are damaged: {problems[0]} ({len(problems)} problems)")
    # To repair takes room as well.
    with _opened(folder, (folder / DATA).stat().st_size + _REPAIR_BYTES) as file:
        entries, damaged, is_indexed = _walk(file)
        if repair and (damaged or not is_indexed):
            _repair(file, damaged)
    return VerifyReport(entries, len(damaged))


def verify_records(folder: Path) -> VerifyReport:
    """Verify the records of a file that others may write; it may miss what changes meanwhile.

    Raises:
        ValueError: its pages are damaged, or it has another format.
        OSError: it can't be read.
    """
    # Others may let it grow, which this process would have to follow.
    max_bytes = 2 * (folder / DATA).stat().st_size + _GROWTH_BYTES
    entries = damaged = 0
    with _opened(folder, max_bytes) as file:
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
    return VerifyReport(entries, damaged)


@contextmanager
def _opened(folder: Path, max_bytes: int) -> Iterator[DiskFile]:
    """Open the file without its encryption key, and make LMDB's errors `ValueError`."""
    try:
        file = DiskFile(folder, max_bytes, reads_values=False)
    except (OtherFormatError, lmdb.Error) as exc:
        raise ValueError(str(exc)) from exc
    try:
        yield file
    except lmdb.Error as exc:
        raise ValueError(f"its pages are damaged: {exc}") from exc
    finally:
        file.close()


def _walk(file: DiskFile) -> tuple[int, list[bytes], bool]:
    """Return how many entries there are, the keys of damaged ones, and whether indexes are right.

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
            if coding == ZSTD_DICTIONARY and not file.load_dictionary(txn):
                damaged.append(key)
            expiring += expires_at < inf
            held[scope_of(key)] += len(record)
            is_indexed = is_indexed and _is_indexed(txn, dbs, key, expires_at, sequence)
        entries, *rows = (txn.stat(db)["entries"] for db in dbs[:4])
        del held[NO_SCOPE]
        counted = {
            bytes(scope): unpack_scope_bytes(bytes(scope), row)
            for scope, row in txn.cursor(db=dbs.scopes)
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
    row = row_of(txn, dbs, sequence)
    if row is None or (row.key, row.expires_at) != (key, expires_at):
        return False
    number = txn.get(pack_order(row), db=dbs.order)
    if number is None or bytes(number) != pack_sequence(sequence):
        return False
    expiry = pack_sort_key(expires_at, sequence)
    return expires_at == inf or txn.get(expiry, db=dbs.expiries) is not None


def _repair(file: DiskFile, damaged: list[bytes]) -> None:
    """Drop the damaged entries, and rebuild the indexes; all priorities are lost."""
    with file.env.begin(write=True) as txn:
        for key in damaged:
            txn.delete(key, db=file.dbs.entries)
        for db in (file.dbs.rows, file.dbs.order, file.dbs.expiries, file.dbs.scopes):
            txn.drop(db, delete=False)
    with file.env.begin(db=file.dbs.entries) as txn:
        keys = list(txn.cursor().iternext(values=False))
    for start in range(0, len(keys), _BATCH):
        with file.env.begin(write=True, buffers=True) as txn:
            work = Transaction(txn, file.dbs, Codec(compresses=False), equal_worth)
            for key in keys[start : start + _BATCH]:
                work.index(key)
            work.end()


if __name__ == "__main__":
    sys.exit(main())
