"""The tiers of a server that traces: subclasses with spans, so that others pay nothing for them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.telemetry.spans import step
from tiers import Answer, AnswerCache, Flight, Freshness, GenerationLock, Purges, Tier
from tiers.entry import Entry


class TracedTier(Tier):
    """A tier with a span for each lookup; used only with tracing, so other hits pay nothing."""

    async def get(self, key: str, purges: Purges, *, counted: bool = True) -> Entry | None:
        if not counted:
            # A wait for another process looks up many times; its span is the wait's.
            return await super().get(key, purges, counted=False)
        with step(f"lookup {self.name}") as span:
            found = await super().get(key, purges)
            span.set_attributes(tier=self.name, found=found is not None)
            return found


class TracedAnswerCache(AnswerCache):
    """An answer cache with a span for each store."""

    async def store(
        self, key: str, flight: Flight, answer: Answer, freshness: Freshness, generation_s: float
    ) -> None:
        with step("store"):
            await super().store(key, flight, answer, freshness, generation_s)


class TracedLock(GenerationLock):
    """A generation lock with a span for each wait."""

    @asynccontextmanager
    async def acquire(
        self, key: str, purge_epoch: int, not_before: float
    ) -> AsyncIterator[Answer | None]:
        with step("turn") as span:
            async with super().acquire(key, purge_epoch, not_before) as answer:
                span.end()
                yield answer
