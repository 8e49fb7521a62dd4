"""The table of purges: labels and their epochs.

A label is `all`, `key:KEY`, or `KIND:NAME` with any kind; what the kinds mean is for the caller.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from struct import Struct, error, pack, unpack_from
from types import MappingProxyType
from typing import Self

from tiers.backend import MAX_KEY_BYTES

ALL = "all"
"""The label of every entry."""
KEY = "key"
"""The kind of the label that every entry has by its key."""
MAX_BYTES = 700_000
"""Of a packed table, such as 9,000 purged keys. Memcached takes no more, in base64."""
MAX_LABELS = 1000
"""Of one purge, so that it fills only a part of the table and is written in milliseconds."""
_NAME_CHARACTERS = 128
_FORMAT = 1
_HEAD = Struct("<B8sI")
"""Format, eight random bytes by which tables are distinguished, and the number of labels."""
HEAD_BYTES = _HEAD.size
_EPOCH_BYTES = 8
_EMPTY: Mapping[str, int] = MappingProxyType({})


def label(kind: str, name: str) -> str:
    """Return the label of that kind and name.

    Args:
        kind: any text without a colon; `KEY` for an entry's key.
        name: a key is taken whole. Of another name, unprintable characters and those after the
            first 128 are left out, so names that differ only in these share a label.
    """
    if kind == KEY:
        return f"{kind}:{name}"
    return f"{kind}:{''.join(filter(str.isprintable, name[:_NAME_CHARACTERS]))}"


class PurgeTable:
    """Labels and their epochs, which are above 0. Immutable.

    A table that would outgrow `max_bytes` purges everything instead, and forgets the labels.
    """

    __slots__ = ("_epochs", "_max_bytes", "latest")

    def __init__(self, epochs: Mapping[str, int] = _EMPTY, *, max_bytes: int = MAX_BYTES) -> None:
        all_epoch = epochs.get(ALL, 0)
        kept = {label: epoch for label, epoch in epochs.items() if epoch > all_epoch}
        self.latest = max(kept.values(), default=all_epoch)
        """The highest epoch, or 0."""
        if all_epoch:
            kept[ALL] = all_epoch
        if _bytes(kept) > max_bytes:
            self.latest += 1
            kept = {ALL: self.latest}
        self._epochs, self._max_bytes = kept, max_bytes

    def purges(self, key: str, purge_epoch: int, labels: bytes) -> bool:
        """Return whether an entry with this key, purge epoch and packed labels is purged."""
        if purge_epoch >= self.latest:
            return False
        epoch_of = self._epochs.get
        if epoch_of(ALL, 0) > purge_epoch or epoch_of(f"key:{key}", 0) > purge_epoch:
            return True
        # A generator would cost half a microsecond more.
        for each in labels.decode().split("\n"):  # noqa: SIM110
            if epoch_of(each, 0) > purge_epoch:
                return True
        return False

    def with_purge(self, clock_us: int, *labels: str) -> Self:
        """Return a table in which all `labels` have one epoch, higher than all others."""
        purged = dict.fromkeys(labels, max(clock_us, self.latest + 1))
        return type(self)(self._epochs | purged, max_bytes=self._max_bytes)

    def merged(self, other: Self) -> Self:
        """Return a table of the labels of both, each with its higher epoch. Commutative."""
        ours = self._epochs
        newer = {label: n for label, n in other._epochs.items() if n > ours.get(label, 0)}
        return type(self)(ours | newer, max_bytes=self._max_bytes) if newer else self

    def reconciled(self, other: Self, known: Self) -> Self:
        """Return a table of both, which may have been numbered without knowing each other.

        A label that one of them has anew, not above the latest epoch of the other, gets an epoch
        above both: entries of the other may carry that latest epoch, and be older than the purge.

        Args:
            other: of another machine.
            known: the last table that both had.
        """
        late = [*self._late_in(other, known), *other._late_in(self, known)]
        merged = self.merged(other)
        return merged.with_purge(0, *late) if late else merged

    def renamed(self, names: Callable[[str], Iterable[str]]) -> Self:
        """Return a table in which each label has other names; one that has none is left out."""
        renamed: dict[str, int] = {}
        for each, epoch in self._epochs.items():
            for name in names(each):
                renamed[name] = max(epoch, renamed.get(name, 0))
        return type(self)(renamed, max_bytes=self._max_bytes)

    def pack(self) -> bytes:
        """Return bytes whose first `HEAD_BYTES` differ from those of every other call."""
        count = len(self._epochs)
        head = _HEAD.pack(_FORMAT, os.urandom(8), count)
        epochs = pack(f"<{count}Q", *self._epochs.values())
        return head + epochs + "\n".join(self._epochs).encode()

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
            epochs = unpack_from(f"<{count}Q", data, _HEAD.size)
        except error as exc:
            raise ValueError("the purges are cut short") from exc
        names_at = _HEAD.size + count * _EPOCH_BYTES
        names = data[names_at:].decode().split("\n") if count else []
        return cls(dict(zip(names, epochs, strict=True)), max_bytes=max_bytes)

    def _late_in(self, other: Self, known: Self) -> Iterator[str]:
        """Yield the labels that `other` has purged anew, but not above our latest epoch."""
        ours, all_epoch, before = self._epochs, self._epochs.get(ALL, 0), known._epochs
        for label, epoch in other._epochs.items():
            if epoch > self.latest:
                continue
            own = max(ours.get(label, 0), all_epoch)
            # A lower one may be what we knew before we purged it again.
            if epoch > own or (epoch < own and epoch != before.get(label)):
                yield label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PurgeTable) and self._epochs == other._epochs

    def __hash__(self) -> int:
        return hash(frozenset(self._epochs.items()))

    def __len__(self) -> int:
        return len(self._epochs)


def check_labels(labels: Sequence[str]) -> None:
    """Check the labels of one purge.

    Raises:
        ValueError: one isn't a label, or there are too many.
    """
    if not 0 < len(labels) <= MAX_LABELS:
        raise ValueError(f"a purge should have from 1 to {MAX_LABELS} labels, not {len(labels)}")
    for each in labels:
        _check_label(each)


def _check_label(label: str) -> None:
    kind, colon, name = label.partition(":")
    if label != ALL and not (kind and colon and name and label.isprintable()):
        should = f"a label should be {ALL}, {KEY}:… or KIND:NAME, in printable characters"
        raise ValueError(f"{should}, not {label[:_NAME_CHARACTERS]!r}")
    if kind == KEY and len(name.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"a key should have at most {MAX_KEY_BYTES} bytes")


def _bytes(epochs: Mapping[str, int]) -> int:
    return len("\n".join(epochs).encode()) + len(epochs) * _EPOCH_BYTES
