"""The administrative operations on the tiers, and their error."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

MAX_PAGE = 1000
"""The most entries of a page."""
STOP_FIRST = "Stop the server first: its file can be compacted only while no process has it open."


class AdminError(Exception):
    """An operation can't be done.

    Args:
        status: as in HTTP; 400 for a wrong argument.
        message: what is wrong, and what would be right.
        param: the argument that is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class EntryQuery(NamedTuple):
    """Which entries to list. An empty field matches all."""

    tier: str = ""
    prefix: str = ""
    """Of the keys."""
    label: str = ""
    limit: int = 100
    after: str = ""
    """The `after` of the previous page."""


class AdminOperations(Protocol):
    """The operations. All raise `AdminError`.

    None of them counts as a request for an entry.
    """

    async def stats(self) -> dict[str, Any]:
        """Return the sizes and counters of `tiers`, and of `prefix` if there is a prefix tier."""

    async def chains(self, limit: int, label: str = "") -> dict[str, Any]:
        """Return the hottest `chains` of the prefix tier; with a label, those that have it."""

    async def page(self, query: EntryQuery) -> dict[str, Any]:
        """Return `entries`, and `after`: the next page's `after`, or `None` on the last page.

        The nearest tier comes first. Within a tier the most frequently requested entries come
        first; on disk, with a prefix, entries are sorted by key. An entry that is requested between
        two pages may be in both or in neither. A page may have fewer entries than its limit.
        """

    async def entry(self, key: str) -> dict[str, Any]:
        """Return an entry with its content as clients get it, but for `id` and `created`."""

    async def purge(self, kind: str, names: Sequence[str] = ()) -> list[str]:
        """Purge all entries whose key, model, tenant or tag is one of `names`, or `all` entries.

        A purge covers all the names, or none if it fails. Returns the labels that were purged. The
        prefix tier comes last: where it alone fails, entries are purged, and it follows later.
        """

    def export(self) -> AsyncGenerator[bytes, None]:
        """Yield the lines of an export of memory and disk, as `export_format` describes them."""

    async def import_(self, lines: AsyncIterator[bytes]) -> dict[str, Any]:
        """Store the entries of an export, and return how many had which result.

        Entries keep their times. Skipped are entries that have expired or were purged, and those
        whose key has an equal or newer entry. Damaged lines are counted, and the first of them are
        described in `problems`.
        """

    async def compact(self) -> dict[str, Any]:
        """Shrink the disk tier's file; return its size in bytes `before` and `after`."""

    async def verify(self) -> dict[str, Any]:
        """Return how many entries the disk tier's file has, and how many of them are damaged.

        With a prefix tier, `prefix` holds the same of its `blocks`.
        """
