"""What can be done to the tiers by hand, in this process or through a server's admin API."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

MAX_PAGE = 1000
"""The most entries of a page."""
STOP_FIRST = "Stop the server first: its file can be compacted only while nobody has it open."


class AdminError(Exception):
    """What was asked for can't be done; the text says why.

    Args:
        status: as HTTP has it; 400 for what was asked wrongly.
        message: says what would be right.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class EntryQuery(NamedTuple):
    """Which entries to list; a field that is empty leaves none out."""

    tier: str = ""
    prefix: str = ""
    """Of their keys."""
    label: str = ""
    limit: int = 100
    after: str = ""
    """Where the page before ended."""


class AdminOperations(Protocol):
    """What can be done; all raise `AdminError` where it can't.

    Nothing counts as asking for an entry but a purge, which drops it.
    """

    async def stats(self) -> dict[str, Any]:
        """Return what the tiers hold and did."""

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        """Return `entries`, and `after`: where the next page begins, or `None` at the end.

        Nearest tier first; in each, what is asked for most first or, on disk with a prefix, by key.
        What is asked for between two pages may be in both or neither. A page may end early.
        """

    async def entry(self, key: str) -> dict[str, Any]:
        """Return an entry with its content as clients get it, but for `id` and `created`."""

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        """Purge all entries whose key, model, tenant, or tag is one of `names`, or `all` of them.

        All at once, or none if it fails. Returns the labels that were purged.
        """

    def export(self) -> AsyncIterator[bytes]:
        """Yield the lines of an export (`server.admin.export_format`) of what memory and disk hold."""

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        """Store the entries of an export, and return how many.

        They keep their times. Left out is what is held already or has expired, and what isn't newer
        than what is held.
        Damaged lines are counted, and the first of them named in `problems`.
        """

    async def compact(self) -> dict[str, Any]:
        """Make the disk tier's file as small as its entries; return its size in bytes."""

    async def verify(self) -> dict[str, Any]:
        """Return how many entries of the disk tier's file there are, and how many are damaged."""
