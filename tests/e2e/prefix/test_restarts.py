"""One vLLM that is killed again and again, and started with another seed of hashes."""

import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from tiers.prefix_kv.maintenance import verify
from tiers.prefix_kv.options import KEY_VARIABLE

from .conftest import LONG, Written, start, unlike
from .engine import Answer, Engine

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not LONG, reason="takes half an hour")]

_KILLS = 50
_FEW = 4


def storing(engine: Engine, prompts: Sequence[list[int]], seconds: float) -> None:
    """Kill an engine that stores the blocks of prompts, after some time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(engine.ask, prompt, tokens=1) for prompt in prompts]
        time.sleep(seconds)
        engine.kill()
    for each in asked:
        # Some have had their answers before.
        assert isinstance(each.exception(), httpx.TransportError | None)


def test_kills_while_storing(tmp_path: Path, written: Written) -> None:
    """Each time it starts, what is indexed verifies, and all answers are right."""
    chance = random.Random(0)
    engine = Engine(tmp_path, tmp_path / "store", environment={KEY_VARIABLE: "ab" * 32})
    kept, expected = unlike(1, 2), list[Answer]()
    with ExitStack() as stack:
        for number in range(_KILLS):
            start(stack, engine)
            answer = engine.ask(kept, tokens=_FEW)
            expected = expected or [answer]
            assert answer.agrees(expected[0])
            if number:
                last = unlike(1000 + 4 * number - 4, 3)
                again = engine.ask(last, tokens=_FEW)
                assert again.agrees(engine.ask(last, tokens=_FEW, cache_salt=str(number)))
            prompts = [unlike(1000 + 4 * number + each, 3) for each in range(4)]
            storing(engine, prompts, chance.uniform(0, 3))
            if number % 2:
                # Otherwise it is the engine that first opens what two dead processes have left.
                with closing(engine.open_store()) as store:
                    report = verify(store)
                assert report.damaged == 0
        assert report.blocks > _KILLS


def test_another_hash_seed_finds_nothing(tmp_path: Path, written: Written) -> None:
    shutil.copytree(written.store, tmp_path / "store")
    prompt, expected = written.asked[0], written.answers[0]
    for seed, loaded in ({"PYTHONHASHSEED": "7"}, 0), ({}, prompt.shared):
        engine = Engine(tmp_path, tmp_path / "store", environment=seed)
        with ExitStack() as stack:
            start(stack, engine)
            answer = engine.ask(prompt.tokens)
            assert answer.cached == answer.loaded == loaded
            assert answer.agrees(expected)
