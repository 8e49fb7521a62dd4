"""A disk tier for purges alone."""

from collections.abc import Callable


class Disk:
    """Keeps one blob, and may open late. Several processes may use it."""

    is_open, blob = True, b""

    def reload(self, _name: str, head: bytes) -> bytes | None:
        """Return the blob unless it begins with `head`."""
        if not self.blob or (head and self.blob.startswith(head)):
            return None
        return self.blob

    async def update(self, _name: str, change: Callable[[bytes | None], bytes]) -> bool:
        """Replace the blob; returns whether that could be done."""
        if self.is_open:
            self.blob = change(self.blob or None)
        return self.is_open
