"""The format of an export: entries as lines of JSON, each with a checksum of its own.

The first line is `{"format":"tierserve-export","version":1}`. Each line after it is an entry:
`key`; `stored_at` and `expires_at` in Unix seconds; `took_s`, `stale_while_revalidate_s` and
`stale_if_error_s` in seconds; `generation` and `labels`, by which it may be purged; `form`, `body`
or `events`; `content` and `usage`, the answer as `tiers.entry` describes it, in Base64 (RFC 4648).
The last is `{"entries":N}`, so that an export that was cut is known by its end. Every line ends
with `,"crc32":"HHHHHHHH"}`, the digits being the CRC-32 of all bytes of the line before that comma.

The format is independent of those in which tiers store entries, so it outlives them.
"""

from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from math import isfinite
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from server.config.schema import Config
from server.protocol.formats import Encoding
from server.web.offload import offload
from tiers import Answer, Entry, Provenance
from tiers.disk import MAX_KEY_BYTES

FORMAT_NAME, VERSION = "tierserve-export", 1

_CHECK = b',"crc32":"'
_CHECK_BYTES = len(_CHECK) + len(b'00000000"}')
_FORMS = {"body": Encoding.JSON, "events": Encoding.SSE}
ENCODING_NAMES = {int(encoding): name for name, encoding in _FORMS.items()}
"""What an encoding is called in exports and in the admin API."""
# By their names in an entry.
_TIMES = {
    "stored_at": "stored_at",
    "expires_at": "expires_at",
    "generation_s": "took_s",
    "stale_while_revalidate_s": "stale_while_revalidate_s",
    "stale_if_error_s": "stale_if_error_s",
}
# For all but the answer.
_ROOM_BYTES = 64 * 1024
# Of Base64 at once, since no thread goes on meanwhile: bytes and digits, both of whole groups.
_PIECE_BYTES, _PIECE_DIGITS = 48 * 1024, 64 * 1024


class ExportedEntry(NamedTuple):
    """An entry and its key."""

    key: str
    entry: Entry


def max_line_bytes(config: Config) -> int:
    """Return how long the line of an answer can be that may be stored."""
    return 2 * config.cache.max_answer_bytes + _ROOM_BYTES


def header_line() -> bytes:
    """Return the line that tells the format."""
    return _line({"format": FORMAT_NAME, "version": VERSION})


def encode_entry(key: str, entry: Entry) -> bytes:
    """Return the line of an entry."""
    return _line(
        {
            "key": key,
            **{name: getattr(entry, field) for field, name in _TIMES.items()},
            "generation": entry.purge_epoch,
            "labels": entry.labels,
            "form": ENCODING_NAMES[entry.answer.encoding],
            "content": _in_base64(entry.answer.content),
            "usage": _in_base64(entry.answer.trailer),
        }
    )


async def encode_entry_offloaded(key: str, entry: Entry) -> bytes:
    """Return the same without stopping others for long, however large the answer is."""
    return await offload(len(entry.answer.content), encode_entry, key, entry)


def footer_line(entries: int) -> bytes:
    """Return the line that tells how many entries there are."""
    return _line({"entries": entries})


def check_header(line: bytes) -> None:
    """Raise `ValueError` unless what follows `line` can be read."""
    try:
        said = _read(line)
    except ValueError as exc:
        raise ValueError(f"should begin as an export of tierserve; its first line {exc}") from exc
    if said.get("format") != FORMAT_NAME:
        raise ValueError("should be an export of tierserve; its first line names another format")
    if said.get("version") != VERSION:
        raise ValueError(f"should be an export of version {VERSION}, not {said.get('version')!r}")


def decode_line(line: bytes) -> ExportedEntry | int:
    """Return the entry of a line, or the number of entries of the last one.

    Raises:
        ValueError: the line is damaged; the text goes after its number.
    """
    said = _read(line)
    if (entries := said.get("entries")) is not None:
        if not isinstance(entries, int) or "key" in said:
            raise ValueError("should tell how many entries there are")
        return entries
    try:
        answer = Answer(
            _FORMS[said["form"]],
            _of_base64(said["content"]),
            _of_base64(said["usage"]),
        )
        times: list[Any] = [float(said[name]) for name in _TIMES.values()]
        origin = Provenance.of(said["generation"], said["labels"])
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"has no entry that could be read: {exc!r}") from exc
    key = said.get("key")
    if not isinstance(key, str) or not 0 < len(key.encode()) <= MAX_KEY_BYTES:
        raise ValueError(f"should have a key of 1 to {MAX_KEY_BYTES} bytes")
    if not all(isfinite(time) and time >= 0 for time in times):
        raise ValueError("has times that can't be")
    if not isinstance(origin.purge_epoch, int) or not 0 <= origin.purge_epoch < 1 << 64:
        raise ValueError("has a generation that can't be")
    entry = Entry(answer, *times)
    return ExportedEntry(key, entry._replace(**origin._asdict()))


async def decode_line_offloaded(line: bytes) -> ExportedEntry | int:
    """Read the same without stopping others for long, however large the answer is."""
    return await offload(len(line), decode_line, line)


async def split_lines(pieces: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
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


def _in_base64(data: bytes) -> str:
    starts = range(0, len(data), _PIECE_BYTES)
    return b"".join(b64encode(data[at : at + _PIECE_BYTES]) for at in starts).decode()


def _of_base64(text: str) -> bytes:
    starts = range(0, len(text), _PIECE_DIGITS)
    return b"".join(b64decode(text[at : at + _PIECE_DIGITS], validate=True) for at in starts)


def _line(fields: dict[str, Any]) -> bytes:
    start = orjson.dumps(fields).removesuffix(b"}")
    return b'%b%b%08x"}\n' % (start, _CHECK, crc32(start))


def _read(line: bytes) -> dict[str, Any]:
    line = line.rstrip(b"\r\n")
    start, check = line[:-_CHECK_BYTES], line[-_CHECK_BYTES:]
    if check != b'%b%08x"}' % (_CHECK, crc32(start)):
        raise ValueError("is damaged or cut: its checksum is wrong or missing")
    try:
        said = orjson.loads(start + b"}")
    except ValueError as exc:
        raise ValueError("isn't JSON") from exc
    if not isinstance(said, dict):
        raise ValueError("isn't a JSON object")
    return said
