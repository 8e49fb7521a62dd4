"""Simulations: replay traces against the tiers, compare policies, and recommend a memory size.

Only the command `tierserve simulate` (`commands`) uses this package.
"""
