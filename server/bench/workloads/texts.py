"""Texts from keyed digests, which are the same in every process and every run.

Words are chosen so that GPT-like tokenizers have one token for each, with a space before it or
without. So the tokens of a text can be counted without a tokenizer: they are its words.
"""

from functools import cache
from hashlib import blake2b, shake_256
from math import log
from pathlib import Path

import orjson

MT_BENCH = Path(__file__).with_name("data") / "mt_bench_question.jsonl"
"""The 80 questions of MT-bench, of two turns each (Apache-2.0, `LICENSE.fastchat` beside them)."""

_LIST = """
able above accept access act active actual add adult age ago air allow almost alone always amount
animal answer apply area arm art ask aspect average avoid away baby back bad bag balance ball bar
base basic bed best big bill bird birth black block blue board boat body book born both bottom box
brain bread break bright broad build burn bus business buy call camp car card care case cat cause
cell center change charge check child choice church circle city claim class clean clear clock close
cloth cloud coast code cold color common cook cool copy cost count country course cover crop cross
cup cut daily dark data date deal deep degree demand depth design detail device dig direct distance
doctor dog door draw dream drive dry dust duty ear early earth east easy eat edge effect egg eight
energy engine entry equal error event exact exam eye face fact fair faith fall family far farm fast
father feed feel feet female few field fight figure fill film final fine finger fire fish fit five
fix flat flight floor flow flower focus food foot force forest form four frame free fresh friend
front fruit fuel full fun future gain game gas gate girl give glass goal gold good grain grand grass
gray green ground group grow growth guide hair half hall hand happy hard hat head health heart heat
height help high hill history hold hole home horse hot hour house human ice idea image inch index
inside iron item job join joint jump
"""
WORDS = tuple(_LIST.split())
"""256 words, so that a byte chooses one."""

_QUESTIONS = (
    "How does the {} {} of a {} {} depend on its {} {}?",
    "Compare a {} {} with a {} {}, and say what a {} {} has to do with it.",
    "Explain to a child why a {} {} needs a {} {} more than a {} {}.",
    "Write a short story about a {} {}, a {} {} and the {} {} between them.",
    "Give three reasons why a {} {} should have a {} {} and no {} {}.",
    "Which steps turn a {} {} into a {} {} without any {} {}?",
    "What would a {} {} say about a {} {} that has lost its {} {}?",
    "Draft an email that asks a {} {} for a {} {} and offers a {} {}.",
)
_QUERIES = (
    "best {} {} for a {} {} with {} {}",
    "how to {} {} a {} {} without {} {}",
    "{} {} or {} {} for {} {}",
    "why is my {} {} so {} {} after {} {}",
    "cheap {} {} {} {} near {} {}",
    "history of the {} {} in {} {} and {} {}",
    "{} {} not {} {} when {} {}",
    "what does {} {} mean in {} {} {} {}",
)


def draw(seed: int, *label: object) -> float:
    """Return a number from 0, included, to 1, excluded, that the seed and the label decide."""
    return (int.from_bytes(_digest(seed, label)[:8]) >> 11) * 2.0**-53


def thinking_s(seed: int, mean_s: float, session: int, turn: int) -> float:
    """Return the seconds, exponentially distributed, before a turn; none before the first."""
    return -mean_s * log(1 - draw(seed, "think", session, turn)) if turn else 0.0


def words(seed: int, label: tuple[object, ...], count: int) -> str:
    """Return so many words, which the seed and the label decide; fewer are the beginning of more.

    Eight words of two labels are equal once in 2^64.
    """
    chosen = shake_256(_digest(seed, label)).digest(count)
    return " ".join([WORDS[number] for number in chosen])


def question(seed: int, *label: object) -> str:
    """Return a question of one sentence, with some 15 to 20 tokens."""
    return _filled(_QUESTIONS, seed, label)


def search_query(seed: int, *label: object) -> str:
    """Return what somebody might type into a search box, with some 10 tokens."""
    return _filled(_QUERIES, seed, label)


@cache
def first_questions() -> tuple[str, ...]:
    """Return the first turns of MT-bench."""
    lines = MT_BENCH.read_bytes().splitlines()
    return tuple(orjson.loads(line)["turns"][0] for line in lines)


def _filled(sentences: tuple[str, ...], seed: int, label: tuple[object, ...]) -> str:
    digest = _digest(seed, label)
    return sentences[digest[0] % len(sentences)].format(*(WORDS[each] for each in digest[1:7]))


def _digest(seed: int, label: tuple[object, ...]) -> bytes:
    """Return 16 bytes; parts of a label are told apart, as long as none holds a NUL."""
    text = "".join(f"{part}\0" for part in label)
    return blake2b(text.encode(), key=(b"%d" % seed)[:64], digest_size=16).digest()
