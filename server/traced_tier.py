"""A tier whose lookups are steps of the road."""

from server.telemetry.spans import step
from tiers import Purges, Tier
from tiers.entry import Entry


class TracedTier(Tier):
    """Stands in for a tier where requests are traced, so that elsewhere a hit pays nothing."""

    async def get(
        self, key: str, purges: Purges, *, counted: bool = True
    ) -> tuple[bytes, Entry] | None:
        if not counted:
            # Who waits for another process looks many times; the step is the wait.
            return await super().get(key, purges, counted=False)
        with step(f"lookup {self.name}") as looking:
            found = await super().get(key, purges)
            looking.tell(tier=self.name, found=found is not None)
            return found
