"""What all tests of benchmarks share."""

from collections.abc import Iterator

import aiohttp
import pytest

from tests.waiting import HANGS_S


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    """Let targets and client processes take their time."""
    timeout = aiohttp.ClientTimeout(total=HANGS_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.bench.target._TIMEOUT_S", HANGS_S)
        patch.setattr("server.bench.cache_state._TIMEOUT", timeout)
        patch.setattr("server.bench.cache_state._PROBE_TIMEOUT", timeout)
        patch.setattr("server.bench.clients.run._START_S", HANGS_S)
        patch.setattr("server.bench.clients.run._SILENCE_S", HANGS_S)
        yield
