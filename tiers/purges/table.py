"""The table of purges: labels and their numbers."""

import os
from collections.abc import Mapping, Sequence
from struct import Struct, error, pack, unpack_from
from types import MappingProxyType
from typing import Self

from tiers.disk import MAX_KEY_BYTES

ALL = "all"
"""The label of every entry."""


KEY = "key"


KINDS = (KEY, "model", "tenant", "tag")
"""What stands before the colon of any other label."""


MAX_BYTES = 700_000
"""Of a table, such as 9,000 purged keys. Memcached takes no more, in base64."""


MAX_LABELS = 1000
"""Of one purge: they are to fill but a part of the table, and to be written in milliseconds."""


_NAME_CHARACTERS = 128


_FORMAT = 1


_HEAD = Struct("<B8sI")
"""Format, eight bytes that no other table has, and the number of labels."""


_NUMBER_BYTES = 8


_NOTHING: Mapping[str, int] = MappingProxyType({})


def label(kind: str, name: str) -> str:
    """Return the label of what is called `name`; names that differ in odd characters may share it.

    Args:
        kind: one of `KINDS`.
        name: its unprintable characters, and those after the first 128, are left out, but not of a
            key, which is to be purged alone.
    """
    if kind == KEY:
        return f"{kind}:{name}"
    return f"{kind}:{''.join(filter(str.isprintable, name[:_NAME_CHARACTERS]))}"


class PurgeTable:
    """Labels and their numbers, which are above 0. Never changed once made.

    A table that would outgrow `max_bytes` purges everything instead, and forgets the labels.
    """

    __slots__ = ("_max_bytes", "_epochs", "latest")

    def __init__(self, epochs: Mapping[str, int] = _NOTHING, *, max_bytes: int = MAX_BYTES) -> None:
        of_all = epochs.get(ALL, 0)
        kept = {label: number for label, number in epochs.items() if number > of_all}
        self.latest = max(kept.values(), default=of_all)
        """The highest number, or 0."""
        if of_all:
            kept[ALL] = of_all
        if _bytes(kept) > max_bytes:
            self.latest += 1
            kept = {ALL: self.latest}
        self._epochs, self._max_bytes = kept, max_bytes

    def purges(self, key: str, purge_epoch: int, labels: bytes) -> bool:
        """Return whether an entry is purged, by its key, its generation, and its packed labels."""
        if purge_epoch >= self.latest:
            return False
        number_of = self._epochs.get
        if number_of(ALL, 0) > purge_epoch or number_of(f"key:{key}", 0) > purge_epoch:
            return True
        # A generator would cost half a microsecond more.
        for each in labels.decode().split("\n"):  # noqa: SIM110
            if number_of(each, 0) > purge_epoch:
                return True
        return False

    def with_purge(self, clock_us: int, *labels: str) -> Self:
        """Return a table in which `labels` have the highest number, one for all of them."""
        number = max(clock_us, self.latest + 1)
        news = dict.fromkeys(labels, number)
        return type(self)(self._epochs | news, max_bytes=self._max_bytes)

    def merged(self, other: Self) -> Self:
        """Return a table of all labels, each with its higher number. The order doesn't matter."""
        mine = self._epochs
        news = {label: n for label, n in other._epochs.items() if n > mine.get(label, 0)}
        return type(self)(mine | news, max_bytes=self._max_bytes) if news else self

    def pack(self) -> bytes:
        """Return bytes that begin like no others, in `HEAD_BYTES`."""
        count = len(self._epochs)
        head = _HEAD.pack(_FORMAT, os.urandom(8), count)
        numbers = pack(f"<{count}Q", *self._epochs.values())
        return head + numbers + "\n".join(self._epochs).encode()

    @classmethod
    def unpack(cls, data: bytes, *, max_bytes: int = MAX_BYTES) -> Self:
        """Read what `pack` wrote.

        Raises:
            ValueError: the bytes are damaged or of another format.
        """
        try:
            version, _, count = _HEAD.unpack_from(data)
            if version != _FORMAT:
                raise ValueError("the purges are of another format")
            numbers = unpack_from(f"<{count}Q", data, _HEAD.size)
        except error as exc:
            raise ValueError("the purges are cut short") from exc
        names_at = _HEAD.size + count * _NUMBER_BYTES
        names = data[names_at:].decode().split("\n") if count else []
        return cls(dict(zip(names, numbers, strict=True)), max_bytes=max_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PurgeTable) and self._epochs == other._epochs

    def __hash__(self) -> int:
        return hash(frozenset(self._epochs.items()))

    def __len__(self) -> int:
        return len(self._epochs)


HEAD_BYTES = _HEAD.size


def check_labels(labels: Sequence[str]) -> None:
    """Raise `ValueError`, which says what would be right, unless `labels` can be purged at once."""
    if not 0 < len(labels) <= MAX_LABELS:
        raise ValueError(f"a purge should have from 1 to {MAX_LABELS} labels, not {len(labels)}")
    for each in labels:
        _check_label(each)


def _check_label(label: str) -> None:
    kind, colon, name = label.partition(":")
    if label != ALL and not (kind in KINDS and colon and name and label.isprintable()):
        kinds = ", ".join(f"{kind}:…" for kind in KINDS)
        said = f"a label should be {ALL} or one of {kinds}, in printable characters"
        raise ValueError(f"{said}, not {label[:_NAME_CHARACTERS]!r}")
    if kind == KEY and len(name.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"a key should have at most {MAX_KEY_BYTES} bytes")


def _bytes(numbers: Mapping[str, int]) -> int:
    return len("\n".join(numbers).encode()) + len(numbers) * _NUMBER_BYTES
