"""Server-sent events, parsed from a stream (WHATWG HTML, section 9.2)."""

import re
from collections.abc import AsyncIterable, AsyncIterator
from typing import NamedTuple

# No engine sends larger events, and one that never ends must not fill the memory.
_EVENT_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
# An empty line after one that isn't empty; CR LF is never split. The pattern begins with rare bytes
# and so passes over the others ten times as fast.
_end = re.compile(rb"[\r\n](?<=[^\r\n].)(?:(?<=\r)\n)?+(?>\r\n|[\r\n])", re.DOTALL).search


class Event(NamedTuple):
    """One event, or a comment between two."""

    raw: bytes
    """The event as received, with its empty line."""
    lines: bytes
    """Its other fields than data, such as its type, each with a line's end."""
    data: bytes
    """Its lines of data, joined; empty for a comment."""
    is_whole: bool
    """Whether its empty line was received, too."""


async def read_events(pieces: AsyncIterable[bytes]) -> AsyncIterator[Event]:
    """Yield the events of a stream that comes in pieces.

    Raises:
        ConnectionAbortedError: an event does not end.
    """
    rest, begins = bytearray(), True
    async for piece in pieces:
        # The rest holds no end of an event, but may hold the beginning of one.
        at, since = 0, max(0, len(rest) - 2)
        rest += piece
        while (found := _end(rest, since)) is not None:
            raw, at = bytes(rest[at : found.end()]), found.end()
            since = at
            yield _event(raw.removeprefix(_BOM) if begins else raw)
            begins = False
        del rest[:at]
        if len(rest) > _EVENT_BYTES:
            raise ConnectionAbortedError("an event of the engine does not end")
    if rest.strip():
        yield _event(bytes(rest))._replace(is_whole=False)


def _event(raw: bytes) -> Event:
    lines, data = [], []
    for line in raw.splitlines():
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name:
            lines.append(line + b"\n")
    return Event(raw, b"".join(lines), b"\n".join(data), is_whole=True)
