"""The memory tier's backend."""
