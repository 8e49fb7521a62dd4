"""What keeps a backend's failure from costing a tier more than misses.

`bulkhead` bounds the calls under way, `circuit_breaker` leaves a failing backend alone, and
`failed_writes` hides what a lost write should have replaced. Knows nothing of tiers or entries.
"""
