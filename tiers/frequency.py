"""The frequency sketch: how often each key was requested lately, in constant memory.

Pure, without I/O; its owner persists it with `dump` and `load`.
"""

from collections.abc import Iterator
from hashlib import blake2b
from struct import Struct, error

_HEADER = Struct("<BBQ")
"""Format version, base-2 logarithm of the capacity, records since the counters were halved."""
_VERSION = 2

_COUNTERS = 4
_BLOCK_KEYS = 16
_MOST = 15
_SAMPLE_FACTOR = 10
_HALVES = bytes(count >> 1 for count in range(256))
_CAPPED = bytes(min(count, _MOST) for count in range(256))
_ADDED_BYTES = 64 * 1024
"""One step of `load`, which takes a sixth of a millisecond."""
_DIGEST_DIGITS = 64

# A count-min sketch: small counters, of which the bits of a key's digest choose four. Keys share
# counters, so a counter may be too high and never too low; the estimate is the least of the four. A
# record raises only the counters that are at this least (conservative update), which keeps the
# others' excess small. With four counters for each key that matters, w keys in all, a counter's
# excess is above 2n/w with a probability of about 1/2 after n records, and so the estimate's with
# about 1/16 (Cormode and Muthukrishnan, "An Improved Data Stream Summary: The Count-Min Sketch and
# its Applications", 2005). All four lie in one block of 64 bytes, one in each quarter, so that a
# record waits for one line of memory and not for four; that is how Caffeine's FrequencySketch is
# laid out (https://github.com/ben-manes/caffeine).
#
# Counters end at 15 and all are halved when ten times the capacity has been recorded. So what was
# popular once is forgotten in a few periods, and a count above 10 means more than a fair share of
# the period: nothing is gained by counting further (Einziger, Friedman and Manes, "TinyLFU: A
# Highly Efficient Cache Admission Policy", 2017, sections 3.3 and 3.4). A counter takes a whole
# byte, not the four bits that it needs, because then one `translate` halves a million in a
# millisecond. The paper's doorkeeper, which saves counters for keys seen once, is left out: it
# would cost a probe on each record to save a few bytes per key.


class FrequencySketch:
    """Approximate counts of requests by key, halved periodically.

    Takes 4 bytes per key of `capacity`, rounded up to a power of two of at least 16.

    Args:
        capacity: the number of keys that matter, such as the entries that the tiers can hold.

    Raises:
        ValueError: `capacity` isn't positive.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be positive, not {capacity}")
        self._resize(max((capacity - 1).bit_length(), _BLOCK_KEYS.bit_length() - 1))
        self._table = bytearray(_COUNTERS * self.capacity)
        self._records = 0

    def record(self, key: str) -> int:
        """Count one more request for `key` and return the new estimate."""
        # Unrolled, since every hit pays for it, and with the common case of `_bits`.
        try:
            bits = int(key[-16:], 16) if len(key) >= _DIGEST_DIGITS else _bits(key)
        except ValueError:
            bits = _bits(key)
        table = self._table
        at_0 = ((bits & self._mask) << 6) + (bits >> 32 & 15)
        at_1 = (at_0 & ~15) + 16 + (bits >> 36 & 15)
        at_2 = (at_0 & ~15) + 32 + (bits >> 40 & 15)
        at_3 = (at_0 & ~15) + 48 + (bits >> 44 & 15)
        least = min(table[at_0], table[at_1], table[at_2], table[at_3])
        if least < _MOST:
            raised = least + 1
            if table[at_0] == least:
                table[at_0] = raised
            if table[at_1] == least:
                table[at_1] = raised
            if table[at_2] == least:
                table[at_2] = raised
            if table[at_3] == least:
                table[at_3] = raised
            least = raised
        self._records += 1
        if self._records >= self._sample:
            self._halve()
        return least

    def estimate(self, key: str) -> int:
        """Return how often `key` was recorded lately, at most 15; too high rather than too low."""
        bits = _bits(key)
        block = (bits & self._mask) << 6
        return min(
            self._table[block + (bits >> 32 & 15)],
            self._table[block + 16 + (bits >> 36 & 15)],
            self._table[block + 32 + (bits >> 40 & 15)],
            self._table[block + 48 + (bits >> 44 & 15)],
        )

    def estimate_after(self, key: str) -> int:
        """Return the estimate that one more `record` of `key` would return."""
        return min(self.estimate(key) + 1, _MOST)

    def double(self) -> None:
        """Make room for twice as many keys; estimates stay as they are."""
        # A block's number gains one bit, so each block becomes two with the same counters.
        self._table *= 2
        self._resize(self.capacity.bit_length())

    def dump(self) -> bytes:
        """Return the bytes that `load` reads."""
        head = _HEADER.pack(_VERSION, self.capacity.bit_length() - 1, self._records)
        # `join` copies what may be megabytes once; the event loop waits for it.
        return b"".join((head, self._table))

    def load(self, data: bytes) -> Iterator[None]:
        """Add the counts that `dump` wrote for a sketch of the same capacity, in steps.

        The caller iterates, and may pause between steps and record requests meanwhile. If the
        counters are halved in between, later parts count double until the next halving.

        Raises:
            ValueError: the bytes are of another format version, capacity, or length.
        """
        try:
            version, log2, records = _HEADER.unpack_from(data)
        except error as exc:
            raise ValueError("sketch is cut short") from exc
        if version != _VERSION:
            raise ValueError("sketch is of another format version")
        if 1 << log2 != self.capacity:
            raise ValueError("sketch is of another capacity")
        if len(data) != _HEADER.size + len(self._table):
            raise ValueError("sketch is cut short or too long")
        return self._add(data[_HEADER.size :], records)

    def _resize(self, log2: int) -> None:
        self.capacity = 1 << log2
        self._mask = self.capacity // _BLOCK_KEYS - 1
        self._sample = _SAMPLE_FACTOR * self.capacity

    def _add(self, table: bytes, records: int) -> Iterator[None]:
        if not self._records:
            self._table[:] = table
        else:
            # Sums of two counts fit in a byte, so one addition of long integers adds all.
            for start in range(0, len(table), _ADDED_BYTES):
                part = slice(start, start + _ADDED_BYTES)
                summed = int.from_bytes(self._table[part]) + int.from_bytes(table[part])
                size = len(table[part])
                self._table[part] = summed.to_bytes(size).translate(_CAPPED)
                yield
        self._records += records
        if self._records >= self._sample:
            self._halve()

    def _halve(self) -> None:
        self._table = self._table.translate(_HALVES)
        self._records //= 2


def _bits(key: str) -> int:
    """Return 64 well-spread bits of `key`, the same in every process.

    The last digits of a digest are; any other key is hashed.
    """
    if len(key) >= _DIGEST_DIGITS:
        try:
            return int(key[-16:], 16)
        except ValueError:
            pass
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
