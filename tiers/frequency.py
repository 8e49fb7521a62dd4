"""How often each key has been asked for lately, in constant memory.

Pure and in process; whoever owns a sketch persists it with `dump` and `restore`.
"""

from hashlib import blake2b
from struct import Struct, error

_HEADER = Struct("<BBQ")
"""Format version, base-2 logarithm of the width, records since the counters were halved."""
_VERSION = 1

_ROWS = 4
_MOST = 15
_SAMPLE_FACTOR = 10
_HALVES = bytes(count >> 1 for count in range(256))
_DIGEST_DIGITS = 64

# A count-min sketch: four rows of small counters, and in each row one counter for a key, chosen by
# other bits of the key's digest. Keys share counters, so a counter may be too high and never too
# low; the estimate is the least of the four. A record raises only the counters that are at this
# least (conservative update), which keeps the others' excess small. With as many counters a row as
# keys that matter, w, a row's excess is above 2n/w with a probability of at most 1/2 after n
# records, and so the estimate's with at most 1/16 (Cormode and Muthukrishnan, "An Improved Data
# Stream Summary: The Count-Min Sketch and its Applications", 2005).
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

    Takes 4 bytes per key of `capacity`, rounded up to a power of two.

    Args:
        capacity: the number of keys that matter, such as what the tiers can hold.

    Raises:
        ValueError: `capacity` isn't positive.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be positive, not {capacity}")
        self._resize(max(capacity - 1, 1).bit_length())
        self._table = bytearray(_ROWS * self.capacity)
        self._records = 0

    def record(self, key: str) -> int:
        """Count one more request for `key` and return the new estimate."""
        # Spelt out, not a loop over the rows: every hit pays for it.
        bits = _bits(key)
        mask, width, table = self._mask, self.capacity, self._table
        at_0 = bits & mask
        at_1 = (bits >> 14 & mask) + width
        at_2 = (bits >> 28 & mask) + width * 2
        at_3 = (bits >> 42 & mask) + width * 3
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
        mask, width, table = self._mask, self.capacity, self._table
        return min(
            table[bits & mask],
            table[(bits >> 14 & mask) + width],
            table[(bits >> 28 & mask) + width * 2],
            table[(bits >> 42 & mask) + width * 3],
        )

    def double(self) -> None:
        """Make room for twice as many keys; estimates stay as they are."""
        width, table = self.capacity, self._table
        rows = (table[row * width : (row + 1) * width] for row in range(_ROWS))
        # The new index has one more bit, so a counter of before stands for two of now.
        self._table = bytearray().join(row * 2 for row in rows)
        self._resize(width.bit_length())

    def dump(self) -> bytes:
        """Return the bytes that `restore` reads."""
        head = _HEADER.pack(_VERSION, self.capacity.bit_length() - 1, self._records)
        return head + bytes(self._table)

    def restore(self, data: bytes) -> None:
        """Count on from what `dump` wrote of a sketch of the same capacity.

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
        self._table[:] = data[_HEADER.size :]
        self._records = records

    def _resize(self, log2: int) -> None:
        self.capacity = 1 << log2
        self._mask = self.capacity - 1
        self._sample = _SAMPLE_FACTOR * self.capacity

    def _halve(self) -> None:
        self._table = self._table.translate(_HALVES)
        self._records //= 2


def _bits(key: str) -> int:
    """Return 64 well-spread bits of `key`, the same in every process.

    Our keys are digests, and their last digits serve; any other text is digested first.
    """
    if len(key) >= _DIGEST_DIGITS:
        try:
            return int(key[-16:], 16)
        except ValueError:
            pass
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
