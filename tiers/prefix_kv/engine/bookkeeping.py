"""What is written to the index in the background: requests of stored blocks, counts, counters.

Owns a thread. Nobody waits for it: what it can't write in time is dropped, and so is what a killed
process has not written yet: some seconds of counters, and up to a minute of counts of requests,
which a large store writes rarely. An idle engine writes nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import lmdb

from tiers.frequency import FrequencySketch
from tiers.prefix_kv import policy
from tiers.prefix_kv.counters import EngineCounts
from tiers.prefix_kv.index.index import PrefixIndex
from tiers.prefix_kv.index.index_file import ReplacedIndexError

logger = logging.getLogger(__name__)

_FLUSH_S = 2.0
_SKETCH_BYTES_PER_S = 64 * 1024
"""Of counts of requests that are written at most: a large store's take 4 MB each time."""
_CLOSE_S = 2.0
_MAX_TOUCHED = 8192
"""Blocks touched between two flushes; a write of one takes 20 µs."""
_TOUCHED_AT_ONCE = 512
"""Blocks touched in one transaction, so that others needn't wait longer than 10 ms for it."""
_SWEPT = 256
"""Records looked at in one flush, to remove those that have expired."""
_BYTES_PER_KEY = 4
"""Of a sketch."""


class Bookkeeper:
    """Counts requests and events of one model, and writes them to the index every few seconds.

    Args:
        index: where they go.
        model: name of the model.
        scope: whose requests are counted; `None` if none are.
        blocks: how many blocks the store has room for.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        index: PrefixIndex,
        model: str,
        scope: bytes | None = None,
        blocks: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index, self._model, self._scope, self._clock = index, model, scope, clock
        self.counts = EngineCounts()
        self._lock = threading.Lock()
        self._known, self._fresh = policy.new_sketch(blocks), policy.new_sketch(blocks)
        self._has_fresh, self._sketched_at = False, clock()
        self._touched: list[tuple[Sequence[bytes], Sequence[int]]] = []
        self._touched_blocks, self._swept = 0, b""
        if scope is not None and (saved := index.sketch(scope)) is not None:
            _load(self._known, saved)
        self.is_lost = False
        """Whether another process has begun the store anew."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefix counts", daemon=True)
        self._thread.start()

    def record(self, hashes: Sequence[bytes]) -> list[int]:
        """Count a request for these blocks; returns how often each was requested lately."""
        with self._lock:
            self._has_fresh = True
            counts = []
            for each in hashes:
                key = each.hex()
                self._fresh.record(key)
                counts.append(self._known.record(key))
            return counts

    def estimate(self, hashes: Sequence[bytes]) -> list[int]:
        """Return how often each of these blocks was requested lately."""
        with self._lock:
            return [self._known.estimate(each.hex()) for each in hashes]

    def touch(self, keys: Sequence[bytes], counts: Sequence[int]) -> None:
        """Have the priorities of a chain's stored blocks raised."""
        with self._lock:
            if self._touched_blocks + len(keys) <= _MAX_TOUCHED:
                self._touched.append((keys, counts))
                self._touched_blocks += len(keys)

    def close(self) -> None:
        """Write what is left, but don't wait long for a disk that hangs."""
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        try:
            while not self._closing.wait(_FLUSH_S):
                self.flush()
            self.flush(is_last=True)
        except ReplacedIndexError as exc:
            self.is_lost = True
            logger.error("prefix blocks aren't used until this engine is restarted: %s", exc)

    def flush(self, *, is_last: bool = False) -> None:
        """Write what there is, which the thread does every few seconds.

        Raises:
            ReplacedIndexError: another process has begun the store anew.
        """
        try:
            self._write(is_last=is_last)
        except ReplacedIndexError:
            raise
        except (lmdb.Error, OSError) as exc:
            self.counts.add("errors")
            logger.warning("counts of prefix blocks could not be written: %s", exc)

    def _write(self, *, is_last: bool) -> None:
        with self._lock:
            touched, self._touched, self._touched_blocks = self._touched, [], 0
        for chains in _batches(_longest(touched)):
            self._index.touch(chains)
        counters: dict[tuple[str, str], float] = {
            (self._model, name): number for name, number in self.counts.take().items()
        }
        sketches = self._sketches(is_last=is_last)
        if counters or sketches:
            self._index.save(counters, sketches)
        self._swept = self._index.sweep(self._swept, _SWEPT)

    def _sketches(self, *, is_last: bool) -> dict[bytes, Callable[[bytes | None], bytes]]:
        pause_s = self._fresh.capacity * _BYTES_PER_KEY / _SKETCH_BYTES_PER_S
        is_due = is_last or self._clock() >= self._sketched_at + pause_s
        if self._scope is None or not self._has_fresh or not is_due:
            return {}
        self._sketched_at = self._clock()
        return {self._scope: self._merged}

    def _merged(self, saved: bytes | None) -> bytes:
        """Return the saved counts with ours added, which are known to all engines then.

        What is counted meanwhile is added, and known, the next time: adding takes a tenth of a
        second in the largest sketch, for which no request should wait.
        """
        with self._lock:
            fresh, self._fresh = self._fresh, FrequencySketch(self._fresh.capacity)
            self._has_fresh = False
        merged = FrequencySketch(fresh.capacity)
        if saved is not None:
            _load(merged, saved)
        _load(merged, fresh.dump())
        with self._lock:
            self._known = merged
        return merged.dump()


def _load(sketch: FrequencySketch, data: bytes) -> None:
    try:
        for _ in sketch.load(data):
            pass
    except ValueError as exc:
        # As after a change of the limit.
        logger.info("counts of requests for prefix blocks begin anew: %s", exc)


def _longest(
    chains: Sequence[tuple[Sequence[bytes], Sequence[int]]],
) -> list[tuple[Sequence[bytes], Sequence[int]]]:
    """Return the chains without those that were requested again, by their last keys."""
    last: Mapping[bytes, tuple[Sequence[bytes], Sequence[int]]] = {
        keys[-1]: (keys, counts) for keys, counts in chains
    }
    return list(last.values())


def _batches(
    chains: Sequence[tuple[Sequence[bytes], Sequence[int]]],
) -> list[list[tuple[Sequence[bytes], Sequence[int]]]]:
    batches: list[list[tuple[Sequence[bytes], Sequence[int]]]] = []
    room = 0
    for chain in chains:
        if room < len(chain[0]) or not batches:
            batches.append([])
            room = _TOUCHED_AT_ONCE
        batches[-1].append(chain)
        room -= len(chain[0])
    return batches
