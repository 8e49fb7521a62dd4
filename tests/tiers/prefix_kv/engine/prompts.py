"""Prompts of these tests, whose engines have blocks of 16 tokens."""

TOKENS = 16
"""Of a block."""


def prompt(blocks: int, seed: int = 0, extra: int = 1) -> list[int]:
    """Return a prompt of so many full blocks and a few tokens more."""
    return [(at * 31 + seed * 7) % 500 for at in range(blocks * TOKENS + extra)]
