"""Traces with the blocks of prompts: Mooncake's and Bailian's, one request a line.

Both have `timestamp`, `input_length`, `output_length` and `hash_ids`, where equal ids mean equal
text up to the end of the block. Requests with the same blocks and the same length are the same, and
so ask for equally long answers: those of the first of them.
"""

from array import array
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from server.bench.records import Integers
from server.bench.workload import Session
from server.bench.workloads.files.fields import count_of, list_of, seconds_of
from server.bench.workloads.files.finite import PieceWorkload, in_time
from server.bench.workloads.files.pieces import Piece
from server.bench.workloads.files.trace_prompts import LEAST_WORDS, TraceOptions, block_prompt
from server.bench.workloads.requests import make_step, user
from server.config.base import ConfigError


class BlockTrace(PieceWorkload[TraceOptions]):
    """A trace whose blocks have a number of tokens."""

    block_tokens: ClassVar[int]
    second: ClassVar[float]
    """How many of the trace's units of time are one."""
    holds = "lines with timestamp, input_length, output_length and hash_ids"
    _answers: Integers

    def _read(self, path: Path) -> int:
        self._block_words = round(self.block_tokens * self.options.scale)
        if self._block_words < LEAST_WORDS:
            least = LEAST_WORDS / self.block_tokens
            should = f"scale should be at least {least:g}, so that blocks stay different"
            raise ConfigError([f"--workload: {self.kind}: {should}"])
        self._times, self._outputs = array("d"), array("q")
        self._first: dict[bytes, int] = {}
        count = super()._read(path)
        order, self.times_s = in_time(self._times)
        self._pieces.reorder(order)
        self._answers = np.array(self._outputs, dtype=np.int64)[order]
        del self._times, self._outputs, self._first
        return count

    def _add(self, piece: Piece) -> bool:
        fields = piece.fields
        self._times.append(seconds_of(fields, "timestamp") / self.second)
        blocks = list_of(fields, "hash_ids")
        if not all(type(block) is int for block in blocks):
            raise ValueError("hash_ids should be a list of whole numbers")
        whole = _whole(fields).digest()
        self._outputs.append(self._first.setdefault(whole, count_of(fields, "output_length")))
        return True

    def session(self, number: int) -> Session:
        fields, scale = self._pieces.fields(number), self.options.scale
        text = block_prompt(
            self.common.seed,
            fields["hash_ids"],
            self._block_words,
            round(count_of(fields, "input_length") * scale),
            _whole(fields).hexdigest(),
            self.options,
        )
        limit = self._limit(round(int(self._answers[number]) * scale))
        return Session((make_step(self.common, [user(text)], limit),), self._at_s(number))


def _whole(fields: dict[str, Any]) -> "blake2b":
    """Return the digest of a whole prompt."""
    text = f"{count_of(fields, 'input_length')} {fields['hash_ids']}"
    return blake2b(text.encode(), digest_size=16)


class Mooncake(BlockTrace):
    """Kimi's traces (kvcache-ai/Mooncake): milliseconds, and blocks of 512 tokens."""

    block_tokens, second = 512, 1000.0


class Bailian(BlockTrace):
    """Alibaba's Qwen traces (alibaba-edu/qwen-bailian-usagetraces): seconds, 16 tokens."""

    block_tokens, second = 16, 1.0
