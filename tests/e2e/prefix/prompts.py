"""Prompts of two parts, made of MT-bench's questions: a beginning that several share, and the rest.

Beginnings are whole blocks, and what follows is less than a block. So whoever has seen a beginning
has all blocks that a prompt can have, and computes the rest of it.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import orjson
from tokenizers import Tokenizer

from server.engine.weights import embedded_folder

from .engine import BLOCK

_QUESTIONS = Path("server/bench/workloads/data/mt_bench_question.jsonl")
LONGEST = 4
"""Blocks of the longest beginnings."""


class Prompt(NamedTuple):
    """Tokens of a prompt, and how many of them are its beginning."""

    tokens: list[int]
    shared: int


def prompts(of_each: int = 10) -> list[Prompt]:
    """Return prompts of eight categories, of which those of a category share a beginning."""
    made = []
    for number, questions in enumerate(_by_category()):
        shared = (1 + number % LONGEST) * BLOCK
        beginning = list(islice(cycle(token for each in questions for token in each), shared))
        made += [
            Prompt(beginning + question[: BLOCK - 8], shared) for question in questions[:of_each]
        ]
    return made


def beginnings(of: Sequence[Prompt]) -> list[list[int]]:
    """Return the different beginnings of prompts, each with one token more."""
    return [[*each, 0] for each in dict.fromkeys(tuple(p.tokens[: p.shared]) for p in of)]


def _by_category() -> list[list[list[int]]]:
    tokenizer = Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))
    found: dict[str, list[list[int]]] = {}
    for line in _QUESTIONS.read_bytes().splitlines():
        question = orjson.loads(line)
        tokens = tokenizer.encode(" ".join(question["turns"])).ids
        found.setdefault(question["category"], []).append(tokens)
    return list(found.values())
