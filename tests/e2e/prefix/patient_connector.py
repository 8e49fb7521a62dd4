"""The connector, which waits for the disk of a machine that stands still, and goes on asking it.

Else one slow load may have the next ones computed, as it should where speed is all that counts.
"""

from tests.waiting import HANGS_S
from tiers.prefix_kv.engine import rates
from tiers.prefix_kv.engine.connector import PrefixConnector

__all__ = ["PrefixConnector"]

# No step is that large, so computing never counts as faster.
rates._MIN_STEP_TOKENS, rates._FIRST_DEADLINE_S = 10**9, HANGS_S
