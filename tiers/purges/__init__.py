"""Purges: what may not be given out any more."""
