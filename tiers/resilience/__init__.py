"""Resilience: a backend's failure costs a tier no more than misses.

`bulkhead` bounds the calls under way, `circuit_breaker` stops calls to a failing backend, and
`failed_writes` hides entries that a lost write should have replaced. The package knows neither
tiers nor entries.
"""
