"""Movement between tiers: promotion, demotion, and the write-behind queue of both."""
