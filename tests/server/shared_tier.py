"""What tests ask of servers that have a shared tier."""

import asyncio
from contextlib import suppress

from tests.server.conftest import Front

AVAILABLE = 'tierserve_tier_available{tier="shared"}'
STORES = 'tierserve_tier_stores_total{tier="shared"}'
DEADLINE_MS = 1000
"""What takes longer counts as missing, so it is as long as it may be."""

_GIVEN_UP_S = 5
"""Longer than a write to the shared tier may take."""


async def stored(front: Front, asked: dict) -> bytes:
    """Return an answer that `front` has stored in the shared tier.

    It stores nothing there until it knows the purges, which nobody else knows of it. What it can't
    write there in time stays out, so it is asked for again.
    """
    while True:
        await front.until_metric(AVAILABLE, 1)
        before = await front.metric(STORES)
        _, _, raw = await front.ask(asked, headers={"Cache-Control": "no-cache"})
        with suppress(TimeoutError):
            await asyncio.wait_for(front.until_above(STORES, before), _GIVEN_UP_S)
            return raw
