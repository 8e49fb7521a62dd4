"""A folder of prefix blocks that two engines have written until they were killed."""

import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from server.config.load import load
from server.preparation.embedded_model import prepare
from tests.e2e.adapter import make_adapter
from tiers.prefix_kv.scope import adapted

from .engine import POET, Answer, Engine
from .prompts import Prompt, beginnings, prompts

R = TypeVar("R")
LONG = os.environ.get("TIERSERVE_LONG") == "1"
ADAPTED = 4
"""Prompts that the adapter has answered."""
BLOCKS = 10
"""Of a small cache; one of them is never used."""


class Written(NamedTuple):
    """What two engines, now dead, have left behind."""

    store: Path
    asked: list[Prompt]
    answers: list[Answer]
    """With the beginnings in the engines' own caches."""
    adapted: list[Answer]
    """The adapter's, to the first prompts."""
    last: list[list[int]]
    """Prompts whose blocks were being stored at the end."""


Pair = tuple[Engine, Engine]


def pair(folder: Path, store: Path, seeds: tuple[int, int] = (0, 0), **arguments: Any) -> Pair:
    """Return two engines of one store, with one thread each, and adapters made of seeds."""
    cpus = sorted(os.sched_getaffinity(0))
    made = []
    for name, cpu, seed in zip("ab", (cpus[0], cpus[-1]), seeds, strict=True):
        make_adapter(folder / name / POET, seed)
        binding = {"VLLM_CPU_OMP_THREADS_BIND": str(cpu)}
        made.append(
            Engine(
                folder / name, store, adapter=folder / name / POET, environment=binding,
                arguments=arguments,
            )
        )  # fmt: skip
    return made[0], made[1]


def start(stack: ExitStack, *engines: Engine) -> None:
    """Start engines at once; they are killed at the end."""
    for engine in engines:
        stack.callback(engine.kill)
        engine.start()
    for engine in engines:
        engine.wait_ready()


def together(*calls: Callable[[], R]) -> list[R]:
    """Return the results of calls that are made at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def until(holds: Callable[[], bool]) -> None:
    """Wait; a test that takes too long is stopped."""
    while not holds():
        time.sleep(0.02)


def counters(engine: Engine) -> dict[str, float]:
    """Return what the engines of the store have counted, but for the last two seconds."""
    with closing(engine.open_store()) as store:
        return {name: number for (_, name), number in store.index.counters().items()}


def times_stored(engine: Engine, prefix: list[int]) -> int:
    """Return how often a prefix is on disk: for the model, adapters, and under salts."""
    wanted = array("I", prefix).tobytes()
    with closing(engine.open_store()) as store:
        scopes = [*store.index.scopes()]
        of_adapters = engine.connector().adapters.values()
        scopes += [adapted(scope, adapter) for scope in scopes for adapter in of_adapters]
        keys = [key for key, _ in store.index.hottest(scopes)]
        chains = filter(None, map(store.index.chain_to, keys))
        return sum(b"".join(details.tokens for _, details in chain) == wanted for chain in chains)


def unlike(number: int, blocks: int) -> list[int]:
    """Return tokens of some blocks and one more, that are like no other prompt's."""
    return [1000 + (number * 7919 + at * 31) % 40000 for at in range(blocks * 128)] + [0]


def halves(asked: Sequence[Prompt]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    middle = len(asked) // 2
    return asked[:middle], asked[middle:]


def kill_while_storing(engines: Sequence[Engine], asked: Sequence[list[int]]) -> None:
    """Kill engines at once as soon as they write blocks of what they are asked."""
    store = engines[0].store
    assert store is not None
    data = store / "blocks.bin"
    before = data.stat().st_mtime_ns
    with ThreadPoolExecutor(len(asked)) as pool:
        for number, prompt in enumerate(asked):
            pool.submit(engines[number % len(engines)].ask, prompt, tokens=1)
        until(lambda: data.stat().st_mtime_ns > before)
        for engine in engines:
            engine.kill()


@pytest.fixture(scope="package")
def written(tmp_path_factory) -> Written:
    prepare(load(Path("configs/laptop.yaml")))
    folder = tmp_path_factory.mktemp("written")
    asked = prompts(10 if LONG else 8)
    with ExitStack() as stack:
        engines = pair(folder, folder / "store")
        start(stack, *engines)

        def answer(engine: Engine, half: Sequence[Prompt]) -> list[Answer]:
            for beginning in beginnings(half):
                engine.ask(beginning, tokens=1)
            return [engine.ask(prompt.tokens) for prompt in half]

        first, second = halves(asked)
        answers = together(lambda: answer(engines[0], first), lambda: answer(engines[1], second))
        # Once to store the beginning, and once with it in the engine's own cache.
        engines[0].ask(asked[0].tokens, model=POET, tokens=1)
        by_poet = [engines[0].ask(each.tokens, model=POET) for each in asked[:ADAPTED]]
        # The adapter's blocks are the last that are stored; none may be missing after the kill.
        until(lambda: times_stored(engines[0], asked[0].tokens[: asked[0].shared]) == 2)
        last = [unlike(number, 4) for number in range(2)]
        kill_while_storing(engines, last)
    return Written(folder / "store", asked, answers[0] + answers[1], by_poet, last)


@pytest.fixture(scope="package")
def engines(tmp_path_factory, written: Written) -> Iterator[Pair]:
    """Two engines on the store, with small caches of their own.

    The second has other contents in the adapter's file.
    """
    made = pair(
        tmp_path_factory.mktemp("engines"), written.store, seeds=(0, 1),
        num_gpu_blocks_override=BLOCKS,
    )  # fmt: skip
    with ExitStack() as stack:
        start(stack, *made)
        yield made
