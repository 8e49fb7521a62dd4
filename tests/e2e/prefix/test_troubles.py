"""Two vLLMs with small caches of their own, whose store is damaged while they run.

Run in the order written, after those of the answers.
"""

import os
import random
import resource
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import lmdb
import pytest

from .conftest import LONG, Pair, Written, counters, unlike, until
from .engine import Answer, Engine
from .prompts import LONGEST, Prompt

pytestmark = pytest.mark.engine

_FLIPPED = 300
_ROUNDS = 20
_FEW = 4
"""Tokens of an answer where it is only asked whether it is right."""


@contextmanager
def _file_limit(engine: Engine, limit_bytes: int) -> Iterator[None]:
    """Limit the files of the engine's workers for a while."""
    kind = resource.RLIMIT_FSIZE
    workers = {each.pid for each in engine.processes() if "Worker" in " ".join(each.cmdline())}
    assert workers
    before = {pid: resource.prlimit(pid, kind) for pid in workers}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, kind, (limit_bytes, hard))
    yield
    for pid, limits in before.items():
        resource.prlimit(pid, kind, limits)


@pytest.fixture
def engine(engines: Pair) -> Engine:
    return engines[0]


def firsts(written: Written) -> list[tuple[Prompt, Answer]]:
    """Return the first prompt of each beginning, with its answer."""
    found: dict[tuple[int, ...], tuple[Prompt, Answer]] = {}
    for each, answer in zip(written.asked, written.answers, strict=True):
        found.setdefault(tuple(each.tokens[: each.shared]), (each, answer))
    return list(found.values())


def ask_until(engine: Engine, written: Written, counter: str) -> None:
    """Ask for right answers from disk until a counter counts."""
    before = counters(engine).get(counter, 0)
    while counters(engine).get(counter, 0) == before:
        for prompt, expected in firsts(written)[:LONGEST]:
            engine.forget()
            assert engine.ask(prompt.tokens, tokens=_FEW).agrees(expected)
    assert engine.is_ready()


def fill_disk(engine: Engine, written: Written) -> None:
    """Have beginnings on disk that can be loaded, and nothing else."""
    purge(engine)
    for prompt, _ in firsts(written)[:LONGEST]:
        engine.ask(prompt.tokens, tokens=1)
        until(lambda prompt=prompt: _is_loaded(engine, prompt))


def purge(engine: Engine) -> None:
    with closing(engine.open_store()) as store:
        before = store.index.purge_epoch()
        engine.forget(on_disk=True)
        until(lambda: store.index.purge_epoch() != before)


def _is_loaded(engine: Engine, prompt: Prompt) -> bool:
    engine.forget()
    return engine.ask(prompt.tokens, tokens=1).loaded == prompt.shared


def test_blocks_are_found_by_an_engine_with_another_cache(written: Written, engine: Engine) -> None:
    """What its own cache has evicted comes from disk again."""
    for _ in range(2):
        for prompt, expected in firsts(written):
            answer = engine.ask(prompt.tokens, tokens=_FEW)
            assert answer.loaded == prompt.shared
            assert answer.agrees(expected)


def test_preempted_requests_are_right(engine: Engine) -> None:
    # At the end of their second block, so that all want a third one at the same time.
    prompts = [unlike(number, 2)[:250] for number in range(5)]
    expected = [engine.ask(each) for each in prompts]
    before = engine.metric("vllm:num_preemptions_total")
    # They may come so far apart that each ends before the next one wants a block.
    for _ in range(_ROUNDS):
        engine.forget()
        answers = engine.ask_all(prompts, at_once=len(prompts))
        for answer, alone in zip(answers, expected, strict=True):
            assert answer.agrees(alone), (answer, alone)
        if engine.metric("vllm:num_preemptions_total") > before:
            return
    raise AssertionError("no request was preempted")


def test_a_reset_purges_the_disk(written: Written, engine: Engine) -> None:
    prompt, expected = firsts(written)[-1]
    purge(engine)
    answer = engine.ask(prompt.tokens)
    assert answer.cached == 0
    assert answer.agrees(expected)
    until(lambda: _is_loaded(engine, prompt))


def test_flipped_bits(written: Written, engine: Engine) -> None:
    fill_disk(engine, written)
    chance = random.Random(0)
    with (engine.store / "blocks.bin").open("r+b", buffering=0) as file:
        size = file.seek(0, 2)
        for _ in range(_FLIPPED):
            at = chance.randrange(size)
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    ask_until(engine, written, "damaged_blocks")


def test_truncated_blocks(written: Written, engine: Engine) -> None:
    fill_disk(engine, written)
    with (engine.store / "blocks.bin").open("r+b") as file:
        file.truncate(2 * 1024**2)
    ask_until(engine, written, "damaged_blocks")


def test_a_full_disk(engine: Engine) -> None:
    """A limit for files stands for a full disk: what is behind it can't be written."""
    before = counters(engine).get("dropped_blocks", 0)
    prompts: Iterator[Sequence[int]] = (unlike(number, 2) for number in range(300, 400))
    with _file_limit(engine, 1024**2):
        while counters(engine).get("dropped_blocks", 0) == before:
            prompt = next(prompts)
            answer = engine.ask(prompt, tokens=_FEW)
            engine.forget()
            assert engine.ask(prompt, tokens=_FEW).agrees(answer)
    assert engine.is_ready()
    assert "can't be stored" in engine.log.read_text()


def test_a_truncated_index(written: Written, engine: Engine) -> None:
    path = engine.store / "index.mdb"
    # Nobody writes meanwhile, and nobody reads, since nothing is asked.
    with lmdb.open(str(path), subdir=False) as index, index.begin(write=True):
        os.truncate(path, 3 * 4096)
    for prompt, expected in firsts(written)[:LONGEST]:
        engine.forget()
        answer = engine.ask(prompt.tokens, tokens=_FEW)
        assert answer.loaded == 0
        assert answer.agrees(expected)
    assert engine.is_ready()
    assert "shorter than its pages" in engine.log.read_text()


@pytest.mark.skipif(not LONG, reason="starts an engine")
def test_a_truncated_index_is_begun_anew(written: Written, engine: Engine) -> None:
    engine.kill()
    engine.start()
    engine.wait_ready()
    prompt, expected = firsts(written)[0]
    answer = engine.ask(prompt.tokens)
    assert answer.cached == 0
    assert answer.agrees(expected)
    until(lambda: _is_loaded(engine, prompt))
