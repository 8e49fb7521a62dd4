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

Mooncake's traces and our own also have the blocks of prompts. Ours have them on lines of their own,
one for each prompt that an engine answered (`server.telemetry.trace_log`).
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from server.telemetry.prompt_blocks import BLOCK_CHARACTERS

ENVELOPE_BYTES = 512
TOKEN_BYTES = 4
MOONCAKE_BLOCK_TOKENS = 512
_BLOCKS, _HASH_IDS = "blocks", "hash_ids"
_is_hexadecimal = re.compile(r"[0-9a-f]{1,64}").fullmatch
_CHARACTERS_PER_TOKEN = 4
"""Of English text, where a trace has no token counts."""


class TraceRequest(NamedTuple):
    """One request of a trace."""

    key: str
    size: int
    """Bytes of its answer."""
    at_s: float = 0
    """The time of the request; 0 if the trace has none."""
    tokens: int = 0
    """Of output; 0 if the trace has none."""


class TracePrompt(NamedTuple):
    """A prompt that an engine answers."""

    tokens: int
    blocks: tuple[int, ...]
    """The full blocks of its tokens. Equal numbers mean that the prompts are equal up to there."""
    output_tokens: int = 0
    at_s: float = 0
    """The time of the request."""


@dataclass(frozen=True)
class Trace:
    """Requests in the order of the file; at least one, or a prompt."""

    name: str
    requests: list[TraceRequest]
    """Those whose answers may be kept."""
    prompts: Mapping[str, TracePrompt] = field(default_factory=dict)
    """Their prompts by key, if the trace has any."""
    bypassed: Sequence[tuple[int, TracePrompt]] = ()
    """Prompts of requests whose answers may not be kept, and how many `requests` came before."""
    block_tokens: int = 0
    """Tokens of a block; 0 without prompts."""

    @cached_property
    def start_s(self) -> float:
        """The time of the first request."""
        first = [request.at_s for request in self.requests[:1]]
        return min(first + [prompt.at_s for _, prompt in self.bypassed[:1]], default=0.0)

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
    found = _Reading()
    for line, row in rows:
        try:
            found.add(row)
        except ValueError as exc:
            raise TraceError(f"{path}:{line}: {exc}") from exc
    if not found.requests and not found.bypassed:
        raise TraceError(f"{path}:1: should hold requests, each with its {_KNOWN}")
    return found.trace(path.stem)


class _Reading:
    """What was read of a trace so far."""

    def __init__(self) -> None:
        self.requests: list[TraceRequest] = []
        self.prompts: dict[str, TracePrompt] = {}
        self.bypassed: list[tuple[int, TracePrompt]] = []
        self._parse: Callable[[Row], TraceRequest] | None = None
        self._tokens = self._characters = 0

    def add(self, row: Row) -> None:
        """Read a row.

        Raises:
            ValueError: it isn't as it should be.
        """
        if _BLOCKS in row:
            self._add_prompt(row)
            return
        if self._parse is None:
            self._parse = _parser(row)
        request = self._parse(row)
        self.requests.append(request)
        if _HASH_IDS in row:
            self.prompts[request.key] = _mooncake_prompt(row)

    def trace(self, name: str) -> Trace:
        """Return the trace."""
        if self._parse is _of_mooncake:
            return Trace(name, self.requests, self.prompts, (), MOONCAKE_BLOCK_TOKENS)
        if not self.prompts and not self.bypassed:
            return Trace(name, self.requests)
        per_block = BLOCK_CHARACTERS / _CHARACTERS_PER_TOKEN
        if self._tokens and self._characters:
            per_block = BLOCK_CHARACTERS * self._tokens / self._characters
        block_tokens = max(1, round(per_block))
        return Trace(
            name,
            self.requests,
            {key: _in_tokens(prompt, block_tokens) for key, prompt in self.prompts.items()},
            [(before, _in_tokens(prompt, block_tokens)) for before, prompt in self.bypassed],
            block_tokens,
        )

    def _add_prompt(self, row: Row) -> None:
        blocks = row[_BLOCKS]
        if not isinstance(blocks, list) or not all(map(_is_digest, blocks)):
            raise ValueError("blocks should be a list of digests in hexadecimal")
        tokens = _count(row, "prompt_tokens") if "prompt_tokens" in row else 0
        if tokens and "characters" in row:
            self._tokens += tokens
            self._characters += _count(row, "characters")
        prompt = TracePrompt(
            tokens,
            tuple(int(block, 16) for block in blocks),
            _count(row, "tokens") if "tokens" in row else 0,
            _seconds(row, "time"),
        )
        if row.get("outcome") == "bypass":
            self.bypassed.append((len(self.requests), prompt))
        else:
            self.prompts[_text(row, "key")] = prompt


def _is_digest(block: object) -> bool:
    return isinstance(block, str) and _is_hexadecimal(block) is not None


def _in_tokens(prompt: TracePrompt, block_tokens: int) -> TracePrompt:
    """Return a prompt of our own trace with a token count that its blocks agree with.

    Its blocks have equal numbers of characters, and so about, but not exactly, equal numbers of
    tokens. The last block is never the whole rest, since an engine computes a token at least.
    """
    return prompt._replace(tokens=max(prompt.tokens, len(prompt.blocks) * block_tokens + 1))


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
    blocks = row.get(_HASH_IDS)
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise ValueError("hash_ids should be a list of whole numbers")
    tokens = _count(row, "output_length")
    at_s = _seconds(row, "timestamp") / 1000
    return TraceRequest(str(blocks), _answer_bytes(tokens), at_s, tokens)


def _mooncake_prompt(row: Row) -> TracePrompt:
    blocks = row[_HASH_IDS]
    tokens = len(blocks) * MOONCAKE_BLOCK_TOKENS
    if "input_length" in row:
        tokens = _count(row, "input_length")
    # The last block isn't full, mostly, and an engine keeps full ones only.
    full = tuple(blocks[: tokens // MOONCAKE_BLOCK_TOKENS])
    return TracePrompt(
        tokens, full, _count(row, "output_length"), _seconds(row, "timestamp") / 1000
    )


_PARSERS: dict[tuple[str, ...], Callable[[Row], TraceRequest]] = {
    ("key", "size"): _of_keys,
    ("lbn", "size"): _of_block_storage,
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _of_azure,
    ("timestamp", "output_length", _HASH_IDS): _of_mooncake,
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
