"""Content codings of requests (RFC 9110, section 8.4.1), which engines don't undo.

We undo one of `DECODED` while the body comes, and refuse a body that is cut short. Other codings,
and several one upon the other, are left to whoever gets the body.
"""

import zlib
from collections.abc import AsyncIterator

from server.protocol.errors import BadRequestError

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
DECODED = frozenset(_WINDOW_BITS)
_GZIP = b"\x1f"
# So much at once may come out of a few bytes.
_PIECE_BYTES = 64 * 1024


class UnknownCodingError(BadRequestError):
    """We have to read a body, and can't undo its coding."""

    status = 415

    def __init__(self, coding: str) -> None:
        super().__init__(f"Content-Encoding should be gzip or deflate, or left out, not {coding!r}")


async def decode(pieces: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """Yield the content of a body in `coding` that comes in `pieces`.

    Raises:
        BadRequestError: it isn't in that coding, or not whole.
    """
    stream = None
    try:
        async for piece in pieces:
            if stream is None:
                # Some leave out the head that `deflate` should have (RFC 1950, section 2.2).
                is_raw = coding == "deflate" and piece[0] & 15 != 8
                stream = zlib.decompressobj(-15 if is_raw else _WINDOW_BITS[coding])
            rest, has_more = piece, True
            while rest or has_more:
                if stream.eof:
                    if not (rest.startswith(_GZIP) and coding != "deflate"):
                        raise zlib.error("more follows its end")
                    # A file of gzip's may be several, one after the other (RFC 1952, section 2.2).
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
