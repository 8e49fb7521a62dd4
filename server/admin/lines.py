"""Lines out of bytes as they come."""

from collections.abc import AsyncIterator


async def split(pieces: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    """Yield lines without their ends; of a line that is longer, the first `max_bytes`."""
    line = bytearray()
    async for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for end in ended:
            line += end[: max_bytes - len(line)]
            yield bytes(line)
            line.clear()
        line += rest[: max_bytes - len(line)]
    if line:
        yield bytes(line)
