"""What the labels of answers, by which they are purged, are called in the prefix tier.

Engines know models and adapters by name, but of tenants only the salts of their prompts, which
begin with the tenants' scopes. Keys and tags are of whole answers, and so of no block.
"""

from collections.abc import Sequence

from server.auth.tenants import Tenants
from tiers.purges.table import ALL, label


class PrefixLabels:
    """Translates labels.

    Args:
        tenants: those that are configured now.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def of(self, label_of_answers: str) -> Sequence[str]:
        """Return the labels of all blocks that a purge of this label covers."""
        kind, _, name = label_of_answers.partition(":")
        if label_of_answers == ALL or kind == "model":
            return (label_of_answers,)
        if kind != "tenant":
            return ()
        scopes = self._tenants.salted_scopes(name)
        # Without salts nobody knows whose a block is.
        return [label("tenant", scope) for scope in scopes] or (ALL,)

    def shown(self, label_of_block: str) -> Sequence[str]:
        """Return the labels of answers that a block's label stands for; itself if nobody knows."""
        kind, _, scope = label_of_block.partition(":")
        names = self._tenants.names_in(scope) if kind == "tenant" else ()
        return [label(kind, name) for name in names] or (label_of_block,)
