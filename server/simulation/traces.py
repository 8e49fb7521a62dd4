"""Traces: requests with their keys and sizes, read from files in the formats of public traces.

The first line's columns or fields decide among four formats:

- `key` and `size` (bytes), and optionally `time` (seconds) and `tokens` (of output).
- `lbn`, `size` and `time`: block storage, where the key is the block.
- `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`: Azure's LLM traces. They have no keys, so the
  pair of lengths is the key. Equal requests have equal lengths, but so have others: the simulation
  has more hits than the traffic had.
- `timestamp` (ms), `output_length` and `hash_ids`: Mooncake's. The key is the list of all prefix
  blocks, so two requests have the same key only if their whole prompts are equal.

The first two may be CSV or JSONL. Without sizes, an answer has `ENVELOPE_BYTES` and `TOKEN_BYTES`
per token.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import orjson

ENVELOPE_BYTES = 512
TOKEN_BYTES = 4
BLOCK_TOKENS = 512
"""Tokens of a prefix block in Mooncake's traces."""


class TraceRequest(NamedTuple):
    """One request of a trace."""

    key: str
    size: int
    """Bytes of its answer."""
    at_s: float = 0
    """The time of the request; 0 if the trace has none."""
    tokens: int = 0
    """Of output; 0 if the trace has none."""
    blocks: tuple[int, ...] = ()
    """The prefix blocks of its prompt, if the trace has any."""


@dataclass(frozen=True)
class Trace:
    """At least one request, in the order of the file."""

    name: str
    requests: list[TraceRequest]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The largest size of each key, in bytes."""
        sizes: dict[str, int] = {}
        for request in self.requests:
            sizes[request.key] = max(request.size, sizes.get(request.key, 0))
        return sizes

    @cached_property
    def footprint_bytes(self) -> int:
        """The size of all different keys together."""
        return sum(self.sizes.values())


class TraceError(ValueError):
    """A trace can't be read. The message has file and line, and what would be right."""


Row = Mapping[str, Any]


def read(path: Path) -> Trace:
    """Read the trace in a file.

    Raises:
        TraceError: it can't be read.
    """
    rows = _lines(path) if path.suffix in {".jsonl", ".json"} else _rows(path)
    requests: list[TraceRequest] = []
    parse: Callable[[Row], TraceRequest] | None = None
    for line, row in rows:
        try:
            if parse is None:
                parse = _parser(row)
            requests.append(parse(row))
        except ValueError as exc:
            raise TraceError(f"{path}:{line}: {exc}") from exc
    if not requests:
        raise TraceError(f"{path}:1: should hold requests, each with its {_KNOWN}")
    return Trace(path.stem, requests)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                yield rows.line_num, row
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise TraceError(f"{path}: can't be read as CSV: {exc}") from exc


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as exc:
                    raise TraceError(f"{path}:{number}: should be JSON: {exc}") from exc
                if not isinstance(row, dict):
                    raise TraceError(f"{path}:{number}: should be a JSON object")
                yield number, row
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _unreadable(path: Path, exc: OSError) -> TraceError:
    return TraceError(f"{path}: should be a readable file: {exc.strerror}")


def _parser(first: Row) -> Callable[[Row], TraceRequest]:
    """Return the parser of the format that the first row has."""
    for columns, parse in _PARSERS.items():
        if first.keys() >= set(columns):
            return parse
    raise ValueError(f"should have {_KNOWN}; not {', '.join(map(str, first))}")


def _of_keys(row: Row) -> TraceRequest:
    time = row.get("time")
    at_s = 0.0 if time in (None, "") else _seconds(row, "time")
    tokens = 0 if row.get("tokens") in (None, "") else _count(row, "tokens")
    return TraceRequest(_text(row, "key"), _count(row, "size"), at_s, tokens)


def _of_block_storage(row: Row) -> TraceRequest:
    at_s = _seconds(row, "time") if "time" in row else 0.0
    return TraceRequest(_text(row, "lbn"), _count(row, "size"), at_s)


def _of_azure(row: Row) -> TraceRequest:
    given, tokens = _count(row, "ContextTokens"), _count(row, "GeneratedTokens")
    try:
        at = datetime.fromisoformat(_text(row, "TIMESTAMP"))
    except ValueError:
        raise ValueError(f"TIMESTAMP should be a date, not {row.get('TIMESTAMP')!r}") from None
    at_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    return TraceRequest(f"{given},{tokens}", _answer_bytes(tokens), at_s, tokens)


def _of_mooncake(row: Row) -> TraceRequest:
    blocks = row.get("hash_ids")
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise ValueError("hash_ids should be a list of whole numbers")
    tokens = _count(row, "output_length")
    at_s = _seconds(row, "timestamp") / 1000
    return TraceRequest(str(blocks), _answer_bytes(tokens), at_s, tokens, tuple(blocks))


_PARSERS: dict[tuple[str, ...], Callable[[Row], TraceRequest]] = {
    ("key", "size"): _of_keys,
    ("lbn", "size"): _of_block_storage,
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _of_azure,
    ("timestamp", "output_length", "hash_ids"): _of_mooncake,
}

_KNOWN = "; or ".join(", ".join(columns) for columns in _PARSERS)


def _answer_bytes(tokens: int) -> int:
    return ENVELOPE_BYTES + TOKEN_BYTES * tokens


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None or value == "":
        raise ValueError(f"{name} is missing")
    return str(value)


def _count(row: Row, name: str) -> int:
    text = _text(row, name)
    # `int` accepts 1_000, too.
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} should be a whole number, not {text!r}")
    return int(text)


def _seconds(row: Row, name: str) -> float:
    text = _text(row, name)
    try:
        at = float(text)
    except ValueError:
        at = -1
    if not (isfinite(at) and at >= 0):
        raise ValueError(f"{name} should be a number from 0, not {text!r}")
    return at
