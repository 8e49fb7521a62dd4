"""Both ways in: a server that answers known requests at once does as one that never does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from tests.server.scripts import Script, scripts
from tests.server.sides import Side, both_ways, difference, examples
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCRIPTS = 10
"""Of an example."""
differential = examples(50, long=600)
_DISK = {"max_bytes": "1GiB", "durability": "interval"}
TIERS: dict[str, dict[str, Any]] = {
    "memory": {"padding": 2000, "disk": None},
    # With a memory tier above, the order of requests at the same time would decide what it evicts.
    # Where writes don't wait, both sides find the same at once.
    "disk": {"padding": 2000, "memory": None, "disk": _DISK},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=TIERS)
async def sides(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Side, Side]]:
    """A server that answers known requests at once, and one that doesn't.

    In the end all that they tell of what they did is the same.
    """
    folder = tmp_path_factory.mktemp(request.param)
    async with both_ways(folder, **TIERS[request.param]) as (one, other):
        yield one, other
        # What is queued for the disk has been written a moment later.
        async with asyncio.timeout(HANGS_S):
            while await one.entries() != await other.entries():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await one.history() == await other.history()
    assert one.access_log() == other.access_log()
    assert one.trace() == other.trace()
    replies = one.outcomes.total()
    hits = sum(times for outcome, times in one.outcomes.items() if "hit" in outcome)
    # Each change of the test draws other examples, with a few hits more or less.
    assert hits > 0.4 * replies
    assert one.answered_at_once > 0.2 * hits
    assert other.answered_at_once == 0


async def have_same_metrics(one: Side, other: Side) -> bool:
    """Wait until what goes on beside requests has ended, and is the same."""
    with suppress(TimeoutError):
        async with asyncio.timeout(HANGS_S):
            while await one.metrics() != await other.metrics():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            return True
    return False


@differential
@given(st.lists(scripts(), min_size=SCRIPTS, max_size=SCRIPTS))
async def test_scripts(sides: tuple[Side, Side], batch: list[Script]) -> None:
    one, other = sides
    for script in batch:
        said, expected = await asyncio.gather(one.play(script), other.play(script))
        if said != expected or one.engine.times != other.engine.times:
            pytest.fail(difference(script, said, expected))
    if not await have_same_metrics(one, other):
        assert await one.metrics() == await other.metrics()
