"""What the tiers would make of a trace: replays, comparisons, and the size that is enough.

Only the command `tierserve simulate` needs it, so a server never loads it.
"""
