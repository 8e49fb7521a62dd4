"""Our own traces (`server.telemetry.trace_log`), replayed with the equalities that they had.

A trace has no prompts, but a digest of each request, and of the pieces of the prompts that engines
answered. The same digest becomes the same prompt, and the same pieces the same beginning. A request
whose answer could not be kept is sampled, so that none keeps it. `time` is that of the answer, the
only one that there is: a request begins later than it did, by the time that it took.
"""

import re
from array import array
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from server.bench.records import Integers
from server.bench.workload import Session
from server.bench.workloads.files.fields import count_of, list_of, seconds_of, text_of
from server.bench.workloads.files.finite import PieceWorkload, in_time
from server.bench.workloads.files.pieces import Piece, PieceFile
from server.bench.workloads.files.trace_prompts import LEAST_WORDS, TraceOptions, block_prompt
from server.bench.workloads.requests import make_step, user
from server.telemetry.prompt_blocks import BLOCK_CHARACTERS

_is_digest = re.compile(r"[0-9a-f]{1,64}").fullmatch
_CHARACTERS_PER_TOKEN = 4
"""Of English text, where a trace has no token counts."""


class OwnTraceOptions(TraceOptions):
    """How a trace is made smaller, and what it doesn't tell."""

    prompt_tokens: Annotated[int, Field(ge=LEAST_WORDS, le=1_000_000)] = 64
    """Of prompts that the trace doesn't tell: their answers were there before it began."""


class OwnTrace(PieceWorkload[OwnTraceOptions]):
    """One session for each request that a tier or an engine answered."""

    holds = "lines with time and key, as log.trace writes them"
    _answers: Integers

    def _read(self, path: Path) -> int:
        self._times, self._outputs = array("d"), array("q")
        self._first: dict[bytes, int] = {}
        self._prompts: dict[bytes, int] = {}
        self._prompt_spans = array("q")
        self._tokens = self._characters = 0
        count = super()._read(path)
        order, self.times_s = in_time(self._times)
        self._pieces.reorder(order)
        self._answers = np.array(self._outputs, dtype=np.int64)[order]
        self._prompt_pieces = PieceFile(path, self._prompt_spans)
        per_block = BLOCK_CHARACTERS / _CHARACTERS_PER_TOKEN
        if self._tokens and self._characters:
            per_block = BLOCK_CHARACTERS * self._tokens / self._characters
        self._block_words = max(LEAST_WORDS, round(per_block * self.options.scale))
        del self._times, self._outputs, self._first, self._prompt_spans
        return count

    def _add(self, piece: Piece) -> bool:
        fields = piece.fields
        at_s = seconds_of(fields, "time")
        tokens = count_of(fields, "tokens") if "tokens" in fields else self.answer_tokens
        if "blocks" in fields:
            self._check_blocks(fields)
            if fields.get("outcome") != "bypass":
                # The request itself has a line of its own.
                self._prompts[_short(text_of(fields, "key"))] = len(self._prompt_spans) // 2
                self._prompt_spans.extend((piece.start, piece.end))
                return False
        else:
            tokens = self._first.setdefault(_short(text_of(fields, "key")), tokens)
        self._times.append(at_s)
        self._outputs.append(tokens)
        return True

    def session(self, number: int) -> Session:
        fields = self._pieces.fields(number)
        is_sampled = "blocks" in fields
        rest = ("sampled", number) if is_sampled else fields["key"]
        limit = self._limit(round(int(self._answers[number]) * self.options.scale))
        text = self._text(fields if is_sampled else self._prompt(fields["key"]), rest)
        step = make_step(self.common, [user(text)], limit, sampled=is_sampled)
        return Session((step,), self._at_s(number))

    def _prompt(self, key: str) -> dict[str, Any]:
        """Return the line of a request's prompt; without fields if the trace has none."""
        number = self._prompts.get(_short(key))
        return {} if number is None else self._prompt_pieces.fields(number)

    def _text(self, prompt: dict[str, Any], rest: object) -> str:
        blocks, known = prompt.get("blocks", ()), prompt.get("prompt_tokens")
        if known is None:
            known = prompt.get("characters", 0) // _CHARACTERS_PER_TOKEN
        if not prompt:
            known = self.options.prompt_tokens
        # Blocks of equal characters have about as many tokens, so they may have a few more.
        tokens = max(
            round(known * self.options.scale), len(blocks) * self._block_words + LEAST_WORDS
        )
        return block_prompt(self.common.seed, blocks, self._block_words, tokens, rest, self.options)

    def _check_blocks(self, fields: dict[str, Any]) -> None:
        blocks = list_of(fields, "blocks")
        if not all(isinstance(each, str) and _is_digest(each) for each in blocks):
            raise ValueError("blocks should be a list of digests in hexadecimal")
        numbers = {
            name: count_of(fields, name)
            for name in ("prompt_tokens", "characters")
            if name in fields
        }
        if len(numbers) == 2:
            self._tokens += numbers["prompt_tokens"]
            self._characters += numbers["characters"]


def _short(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=16).digest()
