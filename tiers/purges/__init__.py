"""Purges: which entries may not be given out any more."""
