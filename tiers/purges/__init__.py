"""Purges: which entries may not be served any more."""
