"""Server-sent events, however they come."""

from collections.abc import AsyncIterator

import pytest

from server.protocol.events import Event, read_events

STREAM = (
    b"\xef\xbb\xbf: hi\n\ndata: one\n\nevent: x\ndata:two\ndata: \ndata:  three\nid\n: no\n\n"
    b"\n\nretry: 7\n\ndata\n\ndata: [DONE]\n\n"
)
EVENTS = [(b"", b""), (b"", b"one"), (b"event: x\nid\n", b"two\n\n three"), (b"retry: 7\n", b""),
          (b"", b""), (b"", b"[DONE]")]  # fmt: skip


async def events_of(*pieces: bytes) -> list[Event]:
    async def come() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return [event async for event in read_events(come())]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
async def test_events_are_the_same_however_they_are_cut(end: bytes) -> None:
    stream = STREAM.replace(b"\n", end)
    for at in range(len(stream)):
        found = await events_of(stream[:at], stream[at:])
        assert [(event.lines, event.data) for event in found] == EVENTS
        assert all(event.is_whole for event in found)
        raw = b"".join(event.raw for event in found)
        assert raw.rstrip() == stream.removeprefix(b"\xef\xbb\xbf").rstrip()
    assert await events_of(*(bytes([byte]) for byte in stream))


async def test_an_event_without_its_end_is_told_as_such() -> None:
    *_, last = await events_of(b"data: one\n\nda", b"ta: two\n")
    assert last == Event(b"data: two\n", b"", b"two", is_whole=False)


async def test_what_does_not_end_is_given_up() -> None:
    with pytest.raises(ConnectionAbortedError):
        await events_of(*[b"data: " + bytes(2**20)] * 17)


async def test_a_large_event_is_searched_for_its_end_once() -> None:
    # In as many pieces, searched from its beginning each time, it would take minutes.
    data = bytes(4 * 2**10)
    (found,) = await events_of(b"data: ", *[data] * 2**11, b"\n\n")
    assert len(found.data) == 8 * 2**20
