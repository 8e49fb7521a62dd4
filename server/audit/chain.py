"""The chain of an audit log: what a line looks like, and how it is sealed to the one before.

A line is a JSON object in ASCII. It begins with its `number` in the chain and ends with `previous`,
the seal of the line before, and `seal`: the HMAC-SHA256, in hexadecimal, of all that stands before
it in the line. So a line proves by itself that it is unchanged, and by `previous` and `number`
where it belongs. Without a key the HMAC has an empty one, and is a digest that everybody can make.
"""

import hmac
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from server.config.base import ConfigError
from server.config.secrets import parse_cipher_key

MAX_LINE_BYTES = 256 * 1024
"""The longest line."""
_MARK = b',"seal":"'
_END = b'"}\n'
_SEAL_BYTES = 64
# The largest that each reader of JSON takes.
_MAX_NUMBER = 2**53


class ChainLink(NamedTuple):
    """What ties a line to its neighbours."""

    number: int
    """From 1, without gaps."""
    previous: str
    """The seal of the line before."""
    seal: str


BEGINNING = ChainLink(0, "", "0" * _SEAL_BYTES)
"""Stands before the first line."""


def sealed(key: bytes, entry: Mapping[str, Any], before: ChainLink) -> tuple[bytes, ChainLink]:
    """Return an entry as the line behind another one, and its link.

    Where the line would be too long, a digest takes the place of the entry's `what`.
    """
    body = _body(entry, before)
    if len(body) + len(_MARK) + _SEAL_BYTES + len(_END) > MAX_LINE_BYTES:
        what = _dump(entry["what"])
        digest = {"sha256": sha256(what).hexdigest(), "bytes": len(what)}
        entry = {**entry, "what": digest}
        body = _body(entry, before)
    seal = _seal(key, body)
    line = b"".join((body, _MARK, seal.encode(), _END))
    return line, ChainLink(before.number + 1, before.seal, seal)


def read_line(key: bytes, line: bytes) -> ChainLink | None:
    """Return the link of a line; `None` unless its seal was made with this key."""
    body, _, end = line.rpartition(_MARK)
    seal, end = end[:_SEAL_BYTES], end[_SEAL_BYTES:]
    if end != _END or not hmac.compare_digest(seal, _seal(key, body).encode()):
        return None
    try:
        fields = json.loads(body + b"}")
        number, previous = fields["number"], fields["previous"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(number, int) or not isinstance(previous, str):
        return None
    if not 0 < number <= _MAX_NUMBER:
        return None
    return ChainLink(number, previous, seal.decode())


def read_key(file: Path | None, field: str) -> bytes:
    """Return the key in a file, which is empty without a file.

    Raises:
        ConfigError: it can't be read, or holds none; `field` names it.
    """
    if file is None:
        return b""
    try:
        return parse_cipher_key(file.read_text(encoding="ascii"))
    except OSError as exc:
        raise ConfigError([f"{field}: {file}: {exc.strerror}"]) from exc
    except ValueError:
        should = "should hold 32 bytes in hexadecimal or base64"
        raise ConfigError([f"{field}: {file} {should}"]) from None


def _body(entry: Mapping[str, Any], before: ChainLink) -> bytes:
    return _dump({"number": before.number + 1, **entry, "previous": before.seal})[:-1]


def _dump(value: Any) -> bytes:
    # The standard library's: orjson writes no lone surrogates, which paths of requests may hold,
    # and control characters of other scripts, which terminals obey.
    return json.dumps(value, separators=(",", ":"), default=str).encode()


def _seal(key: bytes, body: bytes) -> str:
    return hmac.new(key, body, sha256).hexdigest()
