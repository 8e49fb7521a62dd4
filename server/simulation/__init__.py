"""Simulations: replay traces against the tiers, compare policies, and recommend sizes.

Only the command `tierserve simulate` (`commands`) uses this package.
"""
