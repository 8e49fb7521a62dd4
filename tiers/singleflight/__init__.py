"""Single flight: one generation per key at a time, in one process and among many."""
