"""Verifies the pages of an LMDB file, by py-lmdb's verifier, which doesn't map the file.

LMDB trusts its pages, so a damaged one can kill the process that reads it.
"""

from pathlib import Path
from struct import Struct, error
from typing import Any

import lmdb.verify

_PAGE_HEADER_BYTES = 16
_BOUNDS = Struct("=HH")
_NODE = Struct("=HHHH")
"""Low and high half of the value's size, flags, size of the key."""


def page_problems(data: Path) -> list[str]:
    """Return what is wrong with the pages of a file that nobody writes."""
    with data.open("rb") as file:
        try:
            problems: list[str] = PageVerifier(file, data.stat().st_size).verify()
        except lmdb.verify.VerifyError as exc:
            return [str(exc)]
    return problems


def holds_all_pages(data: Path) -> bool:
    """Return whether the file is as long as its meta pages claim; reads only these."""
    size = data.stat().st_size
    with data.open("rb") as file:
        pages = PageVerifier(file, size)
        try:
            pages.detect_engine()
            pages.load_metas()
        except lmdb.verify.VerifyError:
            return False
    return not pages.errors and pages.next_pgno * pages.psize <= size


class PageVerifier(lmdb.verify._Verifier):  # noqa: SLF001
    """py-lmdb's verifier, which also checks that the nodes of a page fill it without a gap.

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
