"""How long tests wait."""

HANGS_S = 240
"""What must come and has not after so long never does: a crowded machine may stand still for more
than a minute."""
