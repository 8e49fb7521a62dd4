"""The format of an export: JSON lines, one per entry, each with its own checksum.

The first line is `{"format":"tierserve-export","version":1}`. Each line after it is an entry:
`key`; `stored_at` and `expires_at` in Unix seconds; `took_s`, `stale_while_revalidate_s` and
`stale_if_error_s` in seconds; `generation` and `labels`, by which purges find it; `form`, which is
`body` or `events`; `content` and `usage`, the answer as `tiers.entry` describes it, in Base64 (RFC
4648). The last line is `{"entries":N}`, so that a truncated export is detected. Every line ends
with `,"crc32":"HHHHHHHH"}`, the digits being the CRC-32 of all bytes of the line before that comma.

The format does not depend on the formats in which tiers store entries.
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
"""The names of encodings in exports and in the admin API."""
# Fields of an entry, and their names in an export.
_TIMES = {
    "stored_at": "stored_at",
    "expires_at": "expires_at",
    "generation_s": "took_s",
    "stale_while_revalidate_s": "stale_while_revalidate_s",
    "stale_if_error_s": "stale_if_error_s",
}
# Of a line, without its answer.
_MAX_FIELDS_BYTES = 64 * 1024
# Base64 holds the GIL, so large answers are encoded in pieces. Both sizes are whole groups.
_PIECE_BYTES, _PIECE_DIGITS = 48 * 1024, 64 * 1024


class ExportedEntry(NamedTuple):
    """An entry of an export, with its key."""

    key: str
    entry: Entry


def max_line_bytes(config: Config) -> int:
    """Return the length of the longest line that an export can have."""
    return 2 * config.cache.max_answer_bytes + _MAX_FIELDS_BYTES


def header_line() -> bytes:
    """Return the first line, which names the format."""
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
            "content": _to_base64(entry.answer.content),
            "usage": _to_base64(entry.answer.trailer),
        }
    )


async def encode_entry_offloaded(key: str, entry: Entry) -> bytes:
    """Return the line of an entry, encoded in a thread if it is large."""
    return await offload(len(entry.answer.content), encode_entry, key, entry)


def footer_line(entries: int) -> bytes:
    """Return the last line, which counts the entries."""
    return _line({"entries": entries})


def check_header(line: bytes) -> None:
    """Raise `ValueError` unless `line` is the first line of an export that this version reads."""
    try:
        fields = _fields(line)
    except ValueError as exc:
        raise ValueError(f"should begin as an export of tierserve; its first line {exc}") from exc
    if fields.get("format") != FORMAT_NAME:
        raise ValueError("should be an export of tierserve; its first line names another format")
    if fields.get("version") != VERSION:
        raise ValueError(f"should be an export of version {VERSION}, not {fields.get('version')!r}")


def decode_line(line: bytes) -> ExportedEntry | int:
    """Return the entry of a line, or the number of entries if it is the last line.

    Raises:
        ValueError: the line is damaged; its message continues a sentence about the line.
    """
    fields = _fields(line)
    if (entries := fields.get("entries")) is not None:
        if not isinstance(entries, int) or "key" in fields:
            raise ValueError("should have either a number of entries or a key")
        return entries
    try:
        answer = Answer(
            _FORMS[fields["form"]],
            _from_base64(fields["content"]),
            _from_base64(fields["usage"]),
        )
        times: list[Any] = [float(fields[name]) for name in _TIMES.values()]
        provenance = Provenance.of(fields["generation"], fields["labels"])
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"has no entry that can be read: {exc!r}") from exc
    key = fields.get("key")
    if not isinstance(key, str) or not 0 < len(key.encode()) <= MAX_KEY_BYTES:
        raise ValueError(f"should have a key of 1 to {MAX_KEY_BYTES} bytes")
    if not all(isfinite(time) and time >= 0 for time in times):
        raise ValueError("has a time that is negative or not finite")
    epoch = provenance.purge_epoch
    if not isinstance(epoch, int) or not 0 <= epoch < 1 << 64:
        raise ValueError("has a generation that is no integer from 0 to 2^64 - 1")
    entry = Entry(answer, *times)
    return ExportedEntry(key, entry._replace(**provenance._asdict()))


async def decode_line_offloaded(line: bytes) -> ExportedEntry | int:
    """Return what `decode_line` does, decoded in a thread if the line is large."""
    return await offload(len(line), decode_line, line)


async def split_lines(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the lines of a byte stream, without line ends and cut to `max_bytes`."""
    line = bytearray()
    async for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            line += end[: max_bytes - len(line)]
            yield bytes(line)
            line.clear()
        line += rest[: max_bytes - len(line)]
    if line:
        yield bytes(line)


def _to_base64(data: bytes) -> str:
    starts = range(0, len(data), _PIECE_BYTES)
    return b"".join(b64encode(data[at : at + _PIECE_BYTES]) for at in starts).decode()


def _from_base64(text: str) -> bytes:
    starts = range(0, len(text), _PIECE_DIGITS)
    return b"".join(b64decode(text[at : at + _PIECE_DIGITS], validate=True) for at in starts)


def _line(fields: dict[str, Any]) -> bytes:
    start = orjson.dumps(fields).removesuffix(b"}")
    return b'%b%b%08x"}\n' % (start, _CHECK, crc32(start))


def _fields(line: bytes) -> dict[str, Any]:
    line = line.rstrip(b"\r\n")
    start, check = line[:-_CHECK_BYTES], line[-_CHECK_BYTES:]
    if check != b'%b%08x"}' % (_CHECK, crc32(start)):
        raise ValueError("is damaged or cut: its checksum is wrong or missing")
    try:
        fields = orjson.loads(start + b"}")
    except ValueError as exc:
        raise ValueError("isn't JSON") from exc
    if not isinstance(fields, dict):
        raise ValueError("isn't a JSON object")
    return fields
