"""The shared tier's backends: aiocache's, for bytes, with what keeps a call's failure harmless.

Each needs an extra package, so each is imported only where it is used.
"""

NAME = "shared"
NAMESPACE = "tierserve"
"""What our keys begin with, before a colon."""
