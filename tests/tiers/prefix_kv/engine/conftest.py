"""Engines of these tests. Whatever imports vLLM takes a quarter of a minute for it."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import HANGS_S
from tiers.prefix_kv.engine import bookkeeping, rates, sides, transfers

TEST_S = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # A busy machine takes minutes to import vLLM.
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.timeout(TEST_S))


@pytest.fixture(scope="session")
def _vllm() -> None:
    """Import vLLM, whose modules warn of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from . import engine  # noqa: F401


@pytest.fixture(autouse=True)
def _vllm_where_it_is_used(request: pytest.FixtureRequest) -> None:
    """Import it for the tests that are marked; the others go without an engine."""
    if request.node.get_closest_marker("engine"):
        request.getfixturevalue("_vllm")


@pytest.fixture(autouse=True)
def _counts_stay(monkeypatch) -> None:
    """Have counts written only when a test says so, and at the end, however long that takes.

    A thread would take them every few seconds, so that tests on a slow machine found none.
    """
    monkeypatch.setattr(bookkeeping, "_FLUSH_S", 3600.0)
    for module in (bookkeeping, transfers):
        monkeypatch.setattr(module, "_CLOSE_S", HANGS_S)


@pytest.fixture
def small_staging(monkeypatch) -> None:
    """Staging memory of tests: 64 MiB less to fill."""
    monkeypatch.setattr(transfers, "STAGING_BYTES", 1024**2)


@pytest.fixture
def new_engine(tmp_path: Path, small_staging, monkeypatch) -> Iterator[Callable[..., Any]]:
    """Return what makes engines, all on one store unless told otherwise.

    One that was made before has stored all that it has staged. Loads have longer than a busy
    machine takes for them, unless a test says otherwise.
    """
    from .engine import Engine

    made: list[Engine] = []
    for name in ("_MIN_DEADLINE_S", "_FIRST_DEADLINE_S"):
        monkeypatch.setattr(rates, name, HANGS_S)
    # Logs go where pytest sees them.
    monkeypatch.setattr("tiers.prefix_kv.engine.connector._show_logs", lambda: None)

    def make(folder: Path = tmp_path, **options: Any) -> Engine:
        for engine in made:
            if engine.worker_connector._worker is not None:
                engine.drain()
        made.append(Engine(folder, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    while sides._stores:
        sides._stores.popitem()[1].close()
