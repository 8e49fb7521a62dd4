"""Content codings of requests (RFC 9110, section 8.4.1), which engines don't decode.

A coding in `DECODED` is decoded while the body comes, and a body that is cut short is refused.
Bodies with other codings, or with several, pass through unchanged.
"""

import zlib
from collections.abc import AsyncIterator

from server.protocol.errors import BadRequestError

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
DECODED = frozenset(_WINDOW_BITS)
_GZIP = b"\x1f"
# A few bytes may decode to gigabytes, so they are decoded in pieces.
_PIECE_BYTES = 64 * 1024


class UnknownCodingError(BadRequestError):
    """A body that must be read has a coding that can't be decoded."""

    status = 415

    def __init__(self, coding: str) -> None:
        super().__init__(f"Content-Encoding should be gzip or deflate, or left out, not {coding!r}")


async def decode(pieces: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """Yield the content of a body in `coding` that comes in `pieces`.

    Raises:
        BadRequestError: it isn't in that coding, or isn't whole.
    """
    stream = None
    try:
        async for piece in pieces:
            if stream is None:
                # Some clients omit the head that `deflate` should have (RFC 1950, section 2.2).
                is_raw = coding == "deflate" and piece[0] & 15 != 8
                stream = zlib.decompressobj(-15 if is_raw else _WINDOW_BITS[coding])
            rest, has_more = piece, True
            while rest or has_more:
                if stream.eof:
                    if not (rest.startswith(_GZIP) and coding != "deflate"):
                        raise zlib.error("more follows its end")
                    # A gzip file may have several members, one after the other (RFC 1952, 2.2).
                    stream = zlib.decompressobj(_WINDOW_BITS[coding])
                content = stream.decompress(rest, _PIECE_BYTES)
                if content:
                    yield content
                rest = stream.unconsumed_tail or stream.unused_data
                has_more = len(content) == _PIECE_BYTES and not stream.eof
        if stream is not None and not stream.eof:
            raise zlib.error("it is cut short")
    except zlib.error as exc:
        text = f"The body should be whole and in {coding}, as its Content-Encoding says."
        raise BadRequestError(text) from exc
